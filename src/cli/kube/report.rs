//! `geminga kube report`: what somebody who helps has to see, in one file. What cannot be read becomes a line in errors.txt.

mod gather;
mod redact;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use geminga_operator::crd::GemingaCluster;
use geminga_runtime::{
    clock::{Clock, SystemClock},
    units::ByteSize,
};
use kube::ResourceExt;
use serde_json::json;

use self::gather::Gather;
use super::{access::Access, archive::Archive};
use crate::cli::{
    exit::{Code, Failure},
    output::{self, Format},
};

/// The directory in the archive.
const DIRECTORY: &str = "geminga-report";

#[derive(Debug, clap::Args)]
pub(crate) struct ReportArgs {
    /// The GemingaCluster. Default: the only one of the namespace, or all there are.
    name: Option<String>,
    /// The file. Default: geminga-report-CLUSTER-DATE.tar.gz, in this directory.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Lines of each container's log, the latest.
    #[arg(long, default_value_t = 2_000, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    log_lines: u32,
    /// Bytes of everything together, before compression; what has no room is left out.
    #[arg(long, default_value = "256MiB", value_name = "SIZE")]
    size_max: ByteSize,
}

pub(super) async fn run(args: &ReportArgs, access: &Access, format: Format) -> Result<(), Failure> {
    if access.all {
        return Err(Failure::usage("a report is of one namespace: name it", "kube report"));
    }
    let clusters: Vec<GemingaCluster> = access.list().await?;
    if let Some(name) = &args.name
        && !clusters.iter().any(|cluster| cluster.name_any() == *name)
    {
        return Err(access.no_cluster(name, &clusters));
    }
    let title = match (&args.name, clusters.as_slice()) {
        (Some(name), _) => name.clone(),
        (None, [only]) => only.name_any(),
        (None, _) => access.namespace.clone(),
    };
    let now = SystemClock.now();
    let file = args.out.clone().unwrap_or_else(|| {
        let date = output::time(now.0 / 1_000 * 1_000).replace([':', '-'], "");
        format!("geminga-report-{title}-{date}.tar.gz").into()
    });
    let part = Part::create(&file)?;
    let archive =
        Archive::new(BufWriter::new(part.open()?), DIRECTORY, now.0 / 1_000, args.size_max.0);
    let gather = Gather::new(access, args.name.as_deref(), args.log_lines, archive);
    let done = Box::pin(gather.everything()).await?;
    let bytes = part.keep(&file)?;
    let row = json!({
        "file": file,
        "bytes": bytes,
        "files": done.files,
        "left_out": done.errors,
    });
    output::object(format, &row)?;
    if done.errors > 0 {
        output::note(&format!("what was left out, and why: {DIRECTORY}/errors.txt in the file"));
    }
    output::note("it has no Secrets; names, addresses and log lines of your cluster are in it");
    Ok(())
}

/// The file while it is not whole; gone if it is not kept. Only its owner may read it.
struct Part(PathBuf);

impl Part {
    fn create(file: &Path) -> Result<Self, Failure> {
        let mut name = file.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let part = Self(file.with_file_name(name));
        part.open().map(drop).map_err(|error| {
            let words = format!("{} cannot be written: {error}", file.display());
            Failure::new(Code::Failed, words, "geminga kube report --out /tmp/report.tar.gz")
        })?;
        Ok(part)
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.0)
    }

    fn keep(self, file: &Path) -> io::Result<u64> {
        fs::rename(&self.0, file)?;
        Ok(fs::metadata(file)?.len())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // kept: it has another name by now
    }
}
