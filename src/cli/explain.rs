//! `geminga explain`: the documentation of every error reason, from the enum itself.

use geminga_client::{Reason, Retry};
use serde_json::{Value, json};

use super::{
    exit::Failure,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// A reason, as errors print it; upper or lower case.
    reason: Option<String>,
}

pub(crate) fn run(args: &ExplainArgs, format: Format) -> Result<(), Failure> {
    let Some(text) = &args.reason else {
        let rows: Vec<Value> = Reason::ALL.iter().map(|reason| row(*reason)).collect();
        return Ok(output::list(format, &["reason", "code", "retry", "meaning"], &rows)?);
    };
    let wanted = text.trim().to_uppercase().replace('-', "_");
    let reason = Reason::parse(&wanted).ok_or_else(|| {
        let shown: String = text.chars().take(60).flat_map(char::escape_default).collect();
        let mut failure = Failure::usage(format!("{shown} is not a reason"), "explain");
        failure.next = "geminga explain".into();
        failure
    })?;
    Ok(output::object(format, &row(reason))?)
}

fn row(reason: Reason) -> Value {
    let retry = match reason.retry() {
        Retry::Safe => "safe: nothing happened",
        Retry::Never => "no: it will be refused again",
        Retry::SameSequence => {
            "only under the same producer name and sequences: it may have happened"
        }
    };
    json!({
        "reason": reason.as_str(),
        "code": format!("{:?}", reason.code()),
        "retry": retry,
        "meaning": reason.meaning(),
        "advice": reason.advice(),
    })
}
