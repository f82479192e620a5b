//! `geminga policy`: what holds for topics, at the levels where it is set.

use clap::{
    Arg, ArgMatches, Args, Command, Error, FromArgMatches, Subcommand,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use geminga_proto::{
    admin::v1::PoliciesResponse,
    policies::{FIELDS, Field},
    v1::{BacklogAction, Policies},
};
use geminga_runtime::units::{ByteSize, Period};
use serde_json::{Value, json};

use super::{
    Global, args,
    exit::Failure,
    output::{self, Format},
};

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show a scope's own values, what holds for it, and from which level each value comes.
    Get {
        /// A tenant, tenant/namespace or tenant/namespace/topic; without one, the cluster.
        scope: Option<String>,
        /// Only what holds: values that some level sets, or that have a default.
        #[arg(long)]
        effective: bool,
    },
    /// Change a scope's own values.
    ///
    /// Times take a unit (30s, 12h, 7d) or are milliseconds; sizes take one (10MiB, 2GB) or are bytes.
    Set {
        /// A tenant, tenant/namespace or tenant/namespace/topic; without one, the cluster.
        scope: Option<String>,
        #[command(flatten)]
        values: Values,
        /// Take a value from the level above again; may be repeated.
        #[arg(long, value_name = "NAME", value_parser = field_names(), hide_possible_values = true)]
        unset: Vec<String>,
    },
}

/// The values of a scope, as flags made from the table of fields.
#[derive(Clone, Debug, Default)]
pub(crate) struct Values(Box<Policies>);

/// What a field counts; its name says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Time,
    Size,
    Count,
    Action,
}

const ACTIONS: [(&str, BacklogAction); 3] = [
    ("reject", BacklogAction::Reject),
    ("hold", BacklogAction::Hold),
    ("evict-oldest", BacklogAction::EvictOldest),
];

fn unit(field: &Field) -> Unit {
    match field.name {
        "backlog_action" => Unit::Action,
        name if name.ends_with("_ms") => Unit::Time,
        name if name.contains("_bytes") => Unit::Size,
        _ => Unit::Count,
    }
}

/// What a field does, in a line.
fn help(name: &str) -> &'static str {
    match name {
        "offload_after_ms" => "Closed ledgers older than this are offloaded",
        "offload_above_bytes" => {
            "Closed ledgers are offloaded, oldest first, while more than this lies on bookies"
        }
        "delete_lag_ms" => "Time from an upload to the deletion of the ledger on bookies",
        "retention_ms" => "Messages that every subscription has settled are kept this long",
        "retention_bytes" => {
            "Messages that every subscription has settled are kept up to this size"
        }
        "ttl_ms" => "Messages older than this count as settled for every subscription",
        "backlog_quota_bytes" => "So much may wait for the slowest subscription of a segment",
        "backlog_quota_ms" => "The oldest message that waits may be so old",
        "backlog_action" => "What happens when more waits",
        "publish_messages_per_s" => "Messages a second that a topic takes; more wait",
        "publish_bytes_per_s" => "Payload a second that a topic takes; more waits",
        "deliver_messages_per_s" => "Messages a second that a subscription delivers",
        "deliver_bytes_per_s" => "Payload a second that a subscription delivers",
        "producers_max" => "Producers of a segment at a time",
        "consumers_max" => "Consumers of a subscription on a segment at a time",
        "subscriptions_max" => "Subscriptions of a topic",
        "topics_max" => "Topics of each namespace",
        "compact_after_bytes" => {
            "A segment is compacted when so much was published since it was last"
        }
        _ => "",
    }
}

fn flag(field: &Field) -> String {
    field.name.replace('_', "-")
}

/// The names of all fields, as flags and as requests write them.
fn field_names() -> impl TypedValueParser<Value = String> {
    let name = |field: &Field| PossibleValue::new(flag(field)).alias(field.name);
    PossibleValuesParser::new(FIELDS.iter().map(name))
}

/// A value with its unit, or as the bare number that the server takes.
fn parse(unit: Unit, text: &str, value_max: u64) -> Result<u64, String> {
    let value = match (text.parse(), unit) {
        (Ok(number), _) => number,
        (Err(_), Unit::Time) => {
            let time: Period = text.parse().map_err(|error| format!("{error}"))?;
            args::millis(time)
        }
        (Err(_), Unit::Size) => text.parse::<ByteSize>().map_err(|error| error.to_string())?.0,
        (Err(_), Unit::Count | Unit::Action) => return Err("expected a whole number".into()),
    };
    if value > value_max {
        return Err(format!("at most {}", shown(unit, value_max)));
    }
    Ok(value)
}

/// A value for people.
fn shown(unit: Unit, value: u64) -> String {
    match unit {
        Unit::Time => Period(std::time::Duration::from_millis(value)).to_string(),
        Unit::Size => ByteSize(value).to_string(),
        Unit::Count => value.to_string(),
        Unit::Action => {
            // Its number on the wire; one of a newer server has no name here.
            let action = i32::try_from(value).ok().and_then(|value| value.try_into().ok());
            let action = action.unwrap_or(BacklogAction::Reject);
            let named = ACTIONS.iter().find(|(_, of)| *of == action);
            named.map_or("reject", |(name, _)| name).to_owned()
        }
    }
}

impl Values {
    fn augment(command: Command) -> Command {
        FIELDS.iter().fold(command, |command, field| {
            let arg = Arg::new(field.name).long(flag(field)).help(help(field.name));
            let value_max = field.value_max;
            command.arg(match unit(field) {
                Unit::Action => {
                    let names = PossibleValuesParser::new(ACTIONS.map(|(name, _)| name));
                    arg.value_parser(names.map(|name| {
                        let named = ACTIONS.iter().find(|(of, _)| *of == name);
                        named.map_or(0, |(_, action)| u64::from((*action as i32).unsigned_abs()))
                    }))
                }
                unit => {
                    let kind = match unit {
                        Unit::Time => "TIME",
                        Unit::Size => "SIZE",
                        Unit::Count | Unit::Action => "COUNT",
                    };
                    arg.value_name(kind)
                        .value_parser(move |text: &str| parse(unit, text, value_max))
                }
            })
        })
    }
}

impl FromArgMatches for Values {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut values = Self::default();
        values.update_from_arg_matches(matches)?;
        Ok(values)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for field in FIELDS {
            if let Some(value) = matches.get_one::<u64>(field.name) {
                (field.set)(&mut self.0, Some(*value));
            }
        }
        Ok(())
    }
}

impl Args for Values {
    fn augment_args(command: Command) -> Command {
        Self::augment(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment(command)
    }
}

pub(crate) async fn policy(command: PolicyCommand, global: &Global) -> Result<(), Failure> {
    let admin = global.client().await?.admin();
    let (answer, effective) = match command {
        PolicyCommand::Get { scope, effective } => {
            (admin.policies(&scope.unwrap_or_default()).await?, effective)
        }
        PolicyCommand::Set { scope, values, unset } => {
            let unset = unset.iter().map(|name| name.replace('-', "_")).collect();
            (admin.set_policies(&scope.unwrap_or_default(), *values.0, unset).await?, false)
        }
    };
    let rows = rows(&answer, effective, global.output);
    let columns = ["policy", "effective", "source", "own"];
    let columns = if effective { &columns[..3] } else { &columns[..] };
    Ok(output::list(global.output, columns, &rows)?)
}

fn rows(answer: &PoliciesResponse, only_effective: bool, format: Format) -> Vec<Value> {
    let own = answer.own.unwrap_or_default();
    let effective = answer.effective.unwrap_or_default();
    let value = |field: &Field, policies: &Policies| {
        let unit = unit(field);
        (field.get)(policies).map(|value| match (format, unit) {
            (Format::Table, _) | (_, Unit::Action) => Value::from(shown(unit, value)),
            _ => Value::from(value),
        })
    };
    FIELDS
        .iter()
        .filter(|field| !only_effective || (field.get)(&effective).is_some())
        .map(|field| {
            let source = answer.sources.get(field.name).map_or("default", String::as_str);
            let mut row = json!({
                "policy": field.name,
                "effective": value(field, &effective),
                "source": source,
            });
            if !only_effective {
                row["own"] = value(field, &own).into();
            }
            row
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(args: &[&str]) -> Result<Policies, Error> {
        let command = Values::augment(Command::new("set"));
        let matches = command.try_get_matches_from([&["set"], args].concat())?;
        Ok(*Values::from_arg_matches(&matches)?.0)
    }

    #[test]
    fn every_field_has_a_flag_and_says_what_it_does() {
        for field in FIELDS {
            assert!(!help(field.name).is_empty(), "{}", field.name);
            let text = if unit(field) == Unit::Action { "hold" } else { "2" };
            let policies = set(&[&format!("--{}", flag(field)), text]).expect("taken");
            assert_eq!((field.get)(&policies), Some(2), "{}", field.name);
            let set: usize = FIELDS.iter().filter(|of| (of.get)(&policies).is_some()).count();
            assert_eq!(set, 1, "{} and nothing else", field.name);
        }
    }

    #[test]
    fn values_have_units_or_are_what_the_server_counts_in() {
        for (flag, text, value) in [
            ("--retention-ms", "7d", 604_800_000),
            ("--retention-ms", "1500", 1_500),
            ("--retention-bytes", "10MiB", 10 << 20),
            ("--publish-bytes-per-s", "2MB", 2_000_000),
            ("--compact-after-bytes", "77", 77),
            ("--topics-max", "12", 12),
            ("--ttl-ms", "0", 0),
        ] {
            let policies = set(&[flag, text]).expect(text);
            let values: Vec<u64> = FIELDS.iter().filter_map(|of| (of.get)(&policies)).collect();
            assert_eq!(values, [value], "{flag} {text}");
        }
        for (flag, text) in [
            ("--retention-ms", "7 weeks"),
            ("--retention-ms", "10MiB"),
            ("--retention-ms", "-1"),
            ("--retention-ms", "999999d"),
            ("--retention-bytes", "7d"),
            ("--topics-max", "1MiB"),
            ("--topics-max", ""),
            ("--backlog-action", "2"),
        ] {
            assert!(set(&[&format!("{flag}={text}")]).is_err(), "{flag} {text}");
        }
    }

    #[test]
    fn rows_name_the_source_of_each_value_and_leave_out_what_does_not_hold() {
        let effective = Policies {
            retention_ms: Some(604_800_000),
            backlog_action: Some(BacklogAction::EvictOldest.into()),
            ..Policies::default()
        };
        let own = Policies { retention_ms: Some(604_800_000), ..Policies::default() };
        let sources = [("retention_ms".to_owned(), "tenant".to_owned())].into();
        let answer = PoliciesResponse { own: Some(own), effective: Some(effective), sources };
        let shown = rows(&answer, true, Format::Table);
        assert_eq!(
            shown,
            [
                json!({"policy": "retention_ms", "effective": "7d", "source": "tenant"}),
                json!({"policy": "backlog_action", "effective": "evict-oldest", "source": "default"}),
            ]
        );
        let all = rows(&answer, false, Format::Json);
        assert_eq!(all.len(), FIELDS.len());
        let kept = all.iter().find(|row| row["policy"] == "retention_ms").expect("there");
        assert_eq!((&kept["own"], &kept["effective"]), (&604_800_000.into(), &604_800_000.into()));
    }
}
