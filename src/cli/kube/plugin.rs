//! `kubectl geminga`: kubectl runs an executable `kubectl-geminga` of the PATH with what follows.

use std::{
    env,
    ffi::OsString,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use serde_json::json;

use crate::cli::{
    exit::{Code, Failure},
    output::{self, Format},
};

/// As kubectl looks for it.
const NAME: &str = "kubectl-geminga";

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Make the link that turns this executable into `kubectl geminga`.
    Install {
        /// Where to; it should be on the PATH. Default: beside this executable.
        #[arg(long, value_name = "DIRECTORY")]
        dir: Option<PathBuf>,
    },
}

/// The arguments of this process; called by its plugin's name, those of `geminga kube`.
pub(crate) fn as_plugin(mut args: Vec<OsString>) -> Vec<OsString> {
    let called = args.first().map(Path::new).and_then(Path::file_name);
    if called.is_some_and(|name| name == NAME) {
        args[0] = "geminga".into();
        args.insert(1, "kube".into());
    }
    args
}

pub(super) fn run(command: &PluginCommand, format: Format) -> Result<(), Failure> {
    let PluginCommand::Install { dir } = command;
    let executable = env::current_exe().and_then(fs::canonicalize)?;
    let beside = || executable.parent().map(Path::to_owned).unwrap_or_default();
    let directory = dir.clone().unwrap_or_else(beside);
    let link = directory.join(NAME);
    install(&executable, &link)?;
    output::object(format, &json!({"plugin": link, "executable": executable}))?;
    let path = env::var_os("PATH").unwrap_or_default();
    let real = fs::canonicalize(&directory).unwrap_or(directory.clone());
    let on_path = env::split_paths(&path).any(|entry| {
        entry == directory || fs::canonicalize(entry).is_ok_and(|entry| entry == real)
    });
    if on_path {
        output::note("try it: kubectl geminga status");
    } else {
        output::note(&format!(
            "kubectl finds it once its directory is on the PATH: export PATH=\"{}:$PATH\"",
            real.display()
        ));
    }
    Ok(())
}

/// Makes the link, or leads the one that is there to `executable`. What is no link is not touched.
fn install(executable: &Path, link: &Path) -> Result<(), Failure> {
    let refused = |error: &dyn std::fmt::Display| {
        let words = format!("{} cannot be made: {error}", link.display());
        Failure::new(Code::Failed, words, "geminga kube plugin install --dir ~/.local/bin")
    };
    match fs::symlink_metadata(link) {
        Ok(found) if !found.is_symlink() => {
            return Err(refused(&"there is a file of that name, which is no link of ours"));
        }
        Ok(_) => fs::remove_file(link).map_err(|error| refused(&error))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(refused(&error)),
    }
    symlink(executable, link).map_err(|error| refused(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(args: &[&str]) -> Vec<OsString> {
        as_plugin(args.iter().map(OsString::from).collect())
    }

    #[test]
    fn called_by_the_plugin_s_name_it_is_geminga_kube() {
        assert_eq!(called(&["/usr/bin/kubectl-geminga", "status"]), ["geminga", "kube", "status"]);
        assert_eq!(called(&["kubectl-geminga"]), ["geminga", "kube"]);
        assert_eq!(called(&["/bin/geminga", "status"]), ["/bin/geminga", "status"]);
        assert!(called(&[]).is_empty());
    }

    #[test]
    fn a_link_is_made_and_led_elsewhere_and_a_file_is_left_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let link = directory.path().join(NAME);
        for executable in ["/bin/one", "/bin/two"] {
            install(Path::new(executable), &link).expect("made");
            assert_eq!(fs::read_link(&link).expect("a link"), Path::new(executable));
        }
        fs::remove_file(&link).expect("removed");
        fs::write(&link, "mine").expect("written");
        assert!(install(Path::new("/bin/one"), &link).is_err());
        assert_eq!(fs::read_to_string(&link).expect("there"), "mine");
    }
}
