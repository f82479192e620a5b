//! Data on standard output: a table for people, JSON or YAML for programs.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{Table, presets::NOTHING};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// One document, or one object a line where there is a stream of them.
    Json,
    /// One document, or a list where there is a stream.
    Yaml,
}

/// Rows with named columns, each a JSON object; shown as a table or as a document.
pub(crate) fn list(format: Format, columns: &[&str], rows: &[Value]) -> io::Result<()> {
    match format {
        Format::Table => {
            let mut table = Table::new();
            table.load_style(NOTHING);
            table.set_header(columns.iter().map(|name| name.to_uppercase().replace('_', " ")));
            for row in rows {
                table.add_row(columns.iter().map(|name| cell(&row[*name])));
            }
            line(&table.to_string())
        }
        Format::Json | Format::Yaml => document(format, &rows),
    }
}

/// One object: as a table, a line a field.
pub(crate) fn object(format: Format, object: &Value) -> io::Result<()> {
    let Format::Table = format else { return document(format, object) };
    let mut table = Table::new();
    table.load_style(NOTHING);
    for (name, value) in object.as_object().into_iter().flatten() {
        let rows =
            value.as_array().filter(|rows| rows.iter().all(Value::is_object) && !rows.is_empty());
        match rows {
            Some(rows) => {
                for row in rows {
                    let words: Vec<String> = row
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(name, value)| format!("{name} {}", cell(value)))
                        .collect();
                    table.add_row([name.replace('_', " "), words.join(", ")]);
                }
            }
            None => {
                table.add_row([name.replace('_', " "), cell(value)]);
            }
        }
    }
    line(&table.to_string())
}

/// Named figures, a line each, for people.
pub(crate) fn fields(rows: &[(&str, String)]) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(NOTHING);
    for (name, value) in rows {
        table.add_row([*name, value.as_str()]);
    }
    line(&table.to_string())
}

/// A serializable value as one document.
pub(crate) fn document(format: Format, value: &impl Serialize) -> io::Result<()> {
    match format {
        Format::Yaml => {
            let text = serde_saphyr::to_string(value).map_err(io::Error::other)?;
            line(text.trim_end())
        }
        Format::Json | Format::Table => {
            line(&serde_json::to_string_pretty(value).map_err(io::Error::other)?)
        }
    }
}

/// One element of a stream: NDJSON, or an element of a YAML list (JSON is YAML).
pub(crate) fn element(
    format: Format,
    value: &impl Serialize,
    to: &mut impl Write,
) -> io::Result<()> {
    if format == Format::Yaml {
        to.write_all(b"- ")?;
    }
    serde_json::to_writer(&mut *to, value).map_err(io::Error::from)?;
    to.write_all(b"\n")
}

/// A line of text.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for row in text.lines() {
        writeln!(out, "{}", row.trim_end())?;
    }
    out.flush()
}

/// A word to the user, beside the data.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}"); // a closed standard error is no reason to stop
}

/// A progress bar on standard error; nothing is drawn where that is no terminal.
pub(crate) fn progress(total: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:12} {bar:40} {percent:>3}% {human_pos} of {human_len}, {per_sec:.0}",
    )
    .expect("a valid template");
    ProgressBar::new(total).with_style(style).with_message(what)
}

/// Milliseconds since the Unix epoch as RFC 3339; empty for what is not a time.
pub(crate) fn time(ms: u64) -> String {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map(|time| time.to_string())
        .unwrap_or_default()
}

/// As [`time`]; null for 0, which names no time.
pub(crate) fn time_or_none(ms: u64) -> Value {
    if ms == 0 { Value::Null } else { time(ms).into() }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
