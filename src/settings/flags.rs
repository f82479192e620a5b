//! The settings as flags of a command, made from the table.

use std::{collections::BTreeMap, path::PathBuf};

use clap::{Arg, ArgMatches, Args, Command, Error, FromArgMatches, value_parser};

use super::table::{Reader, SETTINGS};

/// What was given on the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags {
    /// The configuration file.
    pub(crate) file: Option<PathBuf>,
    /// Key -> text.
    pub(crate) values: BTreeMap<&'static str, String>,
}

const HEADING: &str = "Settings (also in the file and the environment; see: geminga config show)";

impl Flags {
    fn augment(role: Reader, command: Command) -> Command {
        let file = Arg::new("config")
            .long("config")
            .env("GEMINGA_CONFIG")
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("Configuration file (TOML)");
        SETTINGS.iter().filter(|setting| setting.is_for(role)).fold(
            command.arg(file),
            |command, setting| {
                let help = if setting.default.is_empty() {
                    setting.help.to_owned()
                } else {
                    format!("{} [default: {}]", setting.help, setting.default)
                };
                command.arg(
                    Arg::new(setting.key)
                        .long(setting.flag())
                        .value_name("VALUE")
                        .help(help)
                        .hide_short_help(setting.key.starts_with("metadata.c"))
                        .help_heading(HEADING),
                )
            },
        )
    }

    fn read(role: Reader, matches: &ArgMatches) -> Self {
        let given = |key: &str| matches.get_one::<String>(key).cloned();
        let values = SETTINGS
            .iter()
            .filter(|setting| setting.is_for(role))
            .filter_map(|setting| Some((setting.key, given(setting.key)?)))
            .collect();
        Self { file: matches.get_one::<PathBuf>("config").cloned(), values }
    }
}

macro_rules! flags_of {
    ($name:ident, $role:expr) => {
        /// The flags of one role.
        #[derive(Clone, Debug, Default)]
        pub(crate) struct $name(pub(crate) Flags);

        impl FromArgMatches for $name {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
                Ok(Self(Flags::read($role, matches)))
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
                self.0 = Flags::read($role, matches);
                Ok(())
            }
        }

        impl Args for $name {
            fn augment_args(command: Command) -> Command {
                Flags::augment($role, command)
            }

            fn augment_args_for_update(command: Command) -> Command {
                Flags::augment($role, command)
            }
        }
    };
}

flags_of!(BrokerFlags, Reader::Broker);
flags_of!(BookieFlags, Reader::Bookie);
flags_of!(OperatorFlags, Reader::Operator);
flags_of!(AllFlags, Reader::All);
