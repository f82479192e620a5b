//! `geminga context`: named servers, kept in a file, so that nobody types addresses.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Global,
    exit::{Code, Failure},
    output,
};

/// Largest file that is read, bytes: nobody has more servers.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// Remember a server under a name, or change it; the first one is used from then on.
    Set {
        name: String,
        /// http://host:port of any broker; several are separated by commas.
        #[arg(value_name = "URLS")]
        servers: String,
    },
    /// Use this context from now on.
    Use { name: String },
    /// List contexts.
    #[command(alias = "list")]
    Ls,
    /// Forget a context.
    Rm { name: String },
}

/// What the file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contexts {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, Context>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    server: String,
}

/// The server of the current context, if there is one.
///
/// # Errors
/// A file that cannot be read, or is none of ours.
pub(crate) fn current_server() -> Result<Option<String>, Failure> {
    let Some(file) = file_name(|name| std::env::var_os(name).map(PathBuf::from)) else {
        return Ok(None);
    };
    let known = load(&file)?;
    let Some(current) = known.current else { return Ok(None) };
    Ok(known.contexts.get(&current).map(|context| context.server.clone()))
}

pub(crate) fn run(command: ContextCommand, global: &Global) -> Result<(), Failure> {
    let file = file_name(|name| std::env::var_os(name).map(PathBuf::from)).ok_or_else(|| {
        let words = "there is no place for contexts: neither XDG_CONFIG_HOME nor HOME is set";
        Failure::new(Code::Failed, words, "export XDG_CONFIG_HOME=...")
    })?;
    let mut known = load(&file)?;
    match command {
        ContextCommand::Set { name, servers } => {
            // An address that is none is told now, not with the first command.
            geminga_client::Client::check_server(&servers)?;
            known.contexts.insert(name.clone(), Context { server: servers });
            known.current.get_or_insert_with(|| name.clone());
            save(&file, &known)?;
            output::note(&format!("context {name} is kept in {}", file.display()));
        }
        ContextCommand::Use { name } => {
            if !known.contexts.contains_key(&name) {
                return Err(missing(&name));
            }
            known.current = Some(name.clone());
            save(&file, &known)?;
            output::note(&format!("using context {name}"));
        }
        ContextCommand::Ls => {
            let row = |(name, context): (&String, &Context)| {
                json!({
                    "current": if known.current.as_ref() == Some(name) { "*" } else { "" },
                    "name": name,
                    "server": context.server,
                })
            };
            let rows: Vec<Value> = known.contexts.iter().map(row).collect();
            output::list(global.output, &["current", "name", "server"], &rows)?;
            if rows.is_empty() {
                output::note("no contexts; add one: geminga context set NAME URL");
            }
        }
        ContextCommand::Rm { name } => {
            known.contexts.remove(&name).ok_or_else(|| missing(&name))?;
            if known.current.as_ref() == Some(&name) {
                known.current = None;
            }
            save(&file, &known)?;
            output::note(&format!("forgot context {name}"));
        }
    }
    Ok(())
}

fn missing(name: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no context {name}"), "geminga context ls")
}

fn file_name(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|path| path.is_absolute());
    let home = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(home.join("geminga").join("contexts.yaml"))
}

fn load(file: &Path) -> Result<Contexts, Failure> {
    let size = match fs::metadata(file) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contexts::default()),
        Err(error) => return Err(unusable(file, &error)),
    };
    if size > FILE_BYTES_MAX {
        return Err(unusable(file, &"it is too large"));
    }
    let text = fs::read_to_string(file).map_err(|error| unusable(file, &error))?;
    if text.trim().is_empty() {
        return Ok(Contexts::default());
    }
    serde_saphyr::from_str(&text).map_err(|error| unusable(file, &error))
}

/// Whole or not at all: a crash leaves the file before it, or the new one.
fn save(file: &Path, known: &Contexts) -> Result<(), Failure> {
    let text = serde_saphyr::to_string(known).map_err(|error| unusable(file, &error))?;
    let part = file.with_extension("yaml.part");
    let write = || {
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(&part, text)?;
        fs::rename(&part, file)
    };
    write().map_err(|error| unusable(file, &error))
}

fn unusable(file: &Path, error: &dyn std::fmt::Display) -> Failure {
    let words = format!("contexts are kept in {}, which cannot be used: {error}", file.display());
    Failure::new(Code::Failed, words, "geminga --server http://127.0.0.1:8650 topic ls")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_lies_where_the_desktop_standard_says() {
        let of = |name: &'static str, path: &'static str| {
            file_name(move |asked| (asked == name).then(|| PathBuf::from(path)))
        };
        let expected = |path: &str| Some(PathBuf::from(path));
        assert_eq!(of("XDG_CONFIG_HOME", "/x"), expected("/x/geminga/contexts.yaml"));
        assert_eq!(of("HOME", "/home/a"), expected("/home/a/.config/geminga/contexts.yaml"));
        assert_eq!(of("HOME", "relative"), None);
    }

    #[test]
    fn what_is_saved_is_loaded_and_what_is_not_ours_is_an_error() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("deep").join("contexts.yaml");
        assert_eq!(load(&file).expect("missing is empty"), Contexts::default());
        let server = "http://a:1,http://b:2".to_owned();
        let contexts = BTreeMap::from([("prod: 1".to_owned(), Context { server })]);
        let known = Contexts { current: Some("prod: 1".into()), contexts };
        save(&file, &known).expect("saved");
        assert_eq!(load(&file).expect("loaded"), known);
        for bad in ["[1, 2", "contexts: 7", "surprise: 1"] {
            fs::write(&file, bad).expect("written");
            assert!(load(&file).is_err(), "{bad:?}");
        }
    }
}
