//! Logs: `tracing` events to standard error.

use std::{env, io::IsTerminal};

use tracing_subscriber::EnvFilter;

/// Overrides the default filter, in the syntax of `tracing_subscriber::EnvFilter`, such as `info,geminga_bookie=debug`.
const FILTER_VARIABLE: &str = "GEMINGA_LOG";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object per line, for machines.
    Json,
    /// One line of text per event, in colour on a terminal.
    #[default]
    Pretty,
}

/// Starts logging, once a process; a second call does nothing. `default_filter` holds where `GEMINGA_LOG` is absent,
/// empty or cannot be parsed; that it cannot be is logged.
pub fn init_logging(format: LogFormat, default_filter: &str) {
    let wanted = env::var(FILTER_VARIABLE).unwrap_or_default();
    let (filter, problem) = choose_filter(&wanted, default_filter);
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).try_init(),
        LogFormat::Pretty => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
    if let (Ok(()), Some(problem)) = (started, problem) {
        tracing::warn!(
            variable = FILTER_VARIABLE,
            problem,
            "the log filter is not valid, the default holds"
        );
    }
}

/// The filter, and what was wrong with the wanted one.
fn choose_filter(wanted: &str, default_filter: &str) -> (EnvFilter, Option<String>) {
    let default = || EnvFilter::new(default_filter);
    if wanted.trim().is_empty() {
        return (default(), None);
    }
    match EnvFilter::builder().parse(wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (default(), Some(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_cannot_be_parsed_gives_way_to_the_default() {
        let chosen = |wanted| {
            let (filter, problem) = choose_filter(wanted, "info");
            (filter.to_string(), problem.is_some())
        };
        assert_eq!(chosen("geminga_bookie=debug"), ("geminga_bookie=debug".to_owned(), false));
        assert_eq!(chosen(" "), ("info".to_owned(), false));
        assert_eq!(chosen("info,geminga=loud"), ("info".to_owned(), true));
    }

    #[test]
    fn a_second_start_does_nothing() {
        init_logging(LogFormat::Json, "off");
        init_logging(LogFormat::Pretty, "off");
    }
}
