//! The settings of the roles, from four layers: built in, file, environment, flags; the later one wins.

mod flags;
mod table;

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

pub(crate) use flags::{AllFlags, BookieFlags, BrokerFlags, Flags, OperatorFlags};
pub(crate) use table::{Reader, SETTINGS, Setting};

use crate::cli::exit::{Code, Failure};

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Default,
    File(PathBuf),
    Variable(String),
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// A value with its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Value {
    pub(crate) text: String,
    pub(crate) source: Source,
}

/// What holds, for one role.
#[derive(Clone, Debug)]
pub(crate) struct Effective {
    role: Reader,
    values: BTreeMap<&'static str, Value>,
}

/// Settings that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("the configuration file {} cannot be read: {why}", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error("the configuration file {} has {key:?}, which is no setting{near}", path.display())]
    Unknown { path: PathBuf, key: String, near: String },
    #[error("{key} = {text:?} ({from}): {why}")]
    Invalid { key: &'static str, text: String, from: String, why: String },
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        Self::new(Code::Usage, error.to_string(), "geminga config show")
    }
}

impl Effective {
    /// Puts the layers together. `environment` looks a variable up.
    ///
    /// # Errors
    /// A file that cannot be read, or names what is no setting.
    pub(crate) fn load(
        role: Reader,
        flags: &Flags,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, SettingsError> {
        let file = match &flags.file {
            Some(path) => read_file(path)?,
            None => BTreeMap::new(),
        };
        let mut values = BTreeMap::new();
        for setting in SETTINGS.iter().filter(|setting| setting.is_for(role)) {
            let (variable, flag) = (setting.variable(), setting.flag());
            let value = if let Some(text) = flags.values.get(setting.key) {
                Value { text: text.clone(), source: Source::Flag(flag) }
            } else if let Some(text) = environment(&variable) {
                Value { text, source: Source::Variable(variable) }
            } else if let (Some(text), Some(path)) = (file.get(setting.key), &flags.file) {
                Value { text: text.clone(), source: Source::File(path.clone()) }
            } else {
                Value { text: setting.default.to_owned(), source: Source::Default }
            };
            values.insert(setting.key, value);
        }
        Ok(Self { role, values })
    }

    /// All values, in the order of the table.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (&'static Setting, &Value)> + '_ {
        SETTINGS.iter().filter_map(|setting| Some((setting, self.values.get(setting.key)?)))
    }

    /// The text of a setting; none if it is empty.
    ///
    /// # Panics
    /// For a key that the role does not read: a defect.
    pub(crate) fn text(&self, key: &'static str) -> Option<&str> {
        Some(self.value(key).text.as_str()).filter(|text| !text.is_empty())
    }

    fn value(&self, key: &'static str) -> &Value {
        let role = self.role;
        self.values.get(key).unwrap_or_else(|| panic!("{role:?} does not read {key}"))
    }

    /// The value, parsed.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`] with the key, the value and its source.
    pub(crate) fn parse<T: FromStr<Err: fmt::Display>>(
        &self,
        key: &'static str,
    ) -> Result<T, SettingsError> {
        self.value(key).text.parse().map_err(|error: T::Err| self.invalid(key, error.to_string()))
    }

    /// A number of milliseconds.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub(crate) fn millis(&self, key: &'static str) -> Result<Duration, SettingsError> {
        self.parse::<u64>(key).map(Duration::from_millis)
    }

    /// The error for a value that cannot be used.
    pub(crate) fn invalid(&self, key: &'static str, why: impl Into<String>) -> SettingsError {
        let Value { text, source } = self.value(key).clone();
        SettingsError::Invalid { key, text, from: source.to_string(), why: why.into() }
    }
}

/// Flattens a TOML file to `section.name` -> text.
fn read_file(path: &Path) -> Result<BTreeMap<String, String>, SettingsError> {
    let unreadable = |why: String| SettingsError::Unreadable { path: path.to_owned(), why };
    let text = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let table: toml::Table =
        toml::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
    let mut flat = BTreeMap::new();
    for (section, value) in &table {
        match value.as_table() {
            Some(entries) => {
                for (name, value) in entries {
                    let key = format!("{section}.{name}");
                    let text = plain(value).ok_or_else(|| {
                        unreadable(format!(
                            "{key} is neither text, a number, a truth value nor a list of text"
                        ))
                    })?;
                    flat.insert(key, text);
                }
            }
            None => drop(flat.insert(section.clone(), String::new())),
        }
    }
    match flat.keys().find(|key| table::find(key).is_none()) {
        None => Ok(flat),
        Some(key) => {
            Err(SettingsError::Unknown { path: path.to_owned(), near: near(key), key: key.clone() })
        }
    }
}

fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        toml::Value::Array(items) => {
            let texts: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
            texts.map(|texts| texts.join(","))
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

/// The settings of the same name or section, for a hint.
fn near(key: &str) -> String {
    let (section, name) = key.split_once('.').unwrap_or(("", key));
    let like = |setting: &&Setting| {
        setting.key.split_once('.').is_some_and(|(s, n)| n == name || s == section)
    };
    let found: Vec<&str> = SETTINGS.iter().filter(like).map(|setting| setting.key).collect();
    if found.is_empty() { String::new() } else { format!("; there are {}", found.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(file: Option<PathBuf>, values: &[(&'static str, &str)]) -> Flags {
        let values = values.iter().map(|(key, text)| (*key, (*text).to_owned())).collect();
        Flags { file, values }
    }

    #[test]
    fn a_flag_wins_over_the_environment_that_over_the_file_and_that_over_the_default() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("geminga.toml");
        fs::write(
            &file,
            "[metadata]\nendpoints = [\"http://a:1\", \"http://b:2\"]\nlease_ttl_ms = 7000\nprefix = \"/file/\"\n",
        )
        .expect("written");
        let environment = |name: &str| match name {
            "GEMINGA_METADATA_PREFIX" => Some("/environment/".to_owned()),
            "GEMINGA_METADATA_LEASE_TTL_MS" => Some("8000".to_owned()),
            _ => None,
        };
        let flags = flags(Some(file.clone()), &[("metadata.lease_ttl_ms", "9000")]);
        let settings = Effective::load(Reader::Broker, &flags, environment).expect("sound");
        let of = |key| settings.value(key).clone();
        assert_eq!(settings.millis("metadata.lease_ttl_ms"), Ok(Duration::from_secs(9)));
        assert_eq!(of("metadata.lease_ttl_ms").source.to_string(), "flag --metadata-lease-ttl-ms");
        assert_eq!(of("metadata.prefix").text, "/environment/");
        assert_eq!(of("metadata.endpoints").text, "http://a:1,http://b:2");
        assert_eq!(of("metadata.endpoints").source, Source::File(file));
        assert_eq!(of("broker.listen").source, Source::Default);
    }

    #[test]
    fn what_is_no_setting_is_refused_with_those_that_are_like_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("geminga.toml");
        fs::write(&file, "[broker]\nlisten_address = \"127.0.0.1:1\"\n").expect("written");
        let refused = Effective::load(Reader::Broker, &flags(Some(file), &[]), |_| None)
            .expect_err("unknown")
            .to_string();
        assert!(refused.contains("broker.listen_address"), "{refused}");
        assert!(refused.contains("broker.listen,"), "{refused}");
    }

    #[test]
    fn a_wrong_value_names_its_key_and_source() {
        let flags = flags(None, &[("ledger.ensemble", "three")]);
        let settings = Effective::load(Reader::Bookie, &flags, |_| None).expect("sound");
        let wrong = settings.parse::<u32>("ledger.ensemble").expect_err("no number").to_string();
        assert!(wrong.contains("ledger.ensemble = \"three\" (flag --ledger-ensemble)"), "{wrong}");
    }

    #[test]
    fn a_role_reads_its_own_settings_and_those_of_every_role() {
        let keys = |role| -> Vec<&str> {
            SETTINGS.iter().filter(|setting| setting.is_for(role)).map(|s| s.key).collect()
        };
        let operator = keys(Reader::Operator);
        assert!(operator.contains(&"operator.resync_ms") && operator.contains(&"log.level"));
        assert!(!operator.iter().any(|key| key.starts_with("metadata.")), "{operator:?}");
        for role in [Reader::Broker, Reader::Bookie] {
            assert!(!keys(role).iter().any(|key| key.starts_with("operator.")));
            assert!(keys(role).contains(&"metadata.prefix") && keys(role).contains(&"log.level"));
        }
        assert_eq!(keys(Reader::All).len(), SETTINGS.len());
    }

    #[test]
    fn keys_flags_and_variables_are_unique() {
        for (at, setting) in SETTINGS.iter().enumerate() {
            assert!(setting.key.split_once('.').is_some(), "{}", setting.key);
            for other in &SETTINGS[at + 1..] {
                assert_ne!(setting.flag(), other.flag());
                assert_ne!(setting.variable(), other.variable());
            }
        }
    }
}
