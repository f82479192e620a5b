//! `geminga config show`: what holds, and where each value comes from.

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{Global, exit::Failure, output};
use crate::settings::{AllFlags, Effective, Reader};

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting with its value and its source.
    Show {
        /// Only those of one role.
        #[arg(value_enum)]
        role: Option<Role>,
        #[command(flatten)]
        flags: AllFlags,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    Broker,
    Bookie,
    Operator,
}

pub(crate) fn run(command: ConfigCommand, global: &Global) -> Result<(), Failure> {
    let ConfigCommand::Show { role, flags } = command;
    let role = match role {
        None => Reader::All,
        Some(Role::Broker) => Reader::Broker,
        Some(Role::Bookie) => Reader::Bookie,
        Some(Role::Operator) => Reader::Operator,
    };
    let settings = Effective::load(role, &flags.0, |name| std::env::var(name).ok())?;
    let rows: Vec<Value> = settings
        .rows()
        .map(|(setting, value)| {
            json!({
                "key": setting.key,
                "value": value.text,
                "source": value.source.to_string(),
                "variable": setting.variable(),
                "meaning": setting.help,
            })
        })
        .collect();
    Ok(output::list(global.output, &["key", "value", "source"], &rows)?)
}
