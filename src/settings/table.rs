//! Every setting of the roles, once: its key, who reads it, its default and what it means.
//!
//! The same key is `[section] name` in the file, `GEMINGA_SECTION_NAME` in the environment and `--section-name` as a flag.

/// Who reads a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    Broker,
    Bookie,
    /// Brokers and bookies.
    Both,
    Operator,
    /// Every role.
    All,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// `section.name`
    pub(crate) key: &'static str,
    pub(crate) reader: Reader,
    pub(crate) default: &'static str,
    pub(crate) help: &'static str,
}

const fn setting(
    key: &'static str,
    reader: Reader,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting { key, reader, default, help }
}

use Reader::{All, Bookie, Both, Broker, Operator};

/// All of them, in the order in which they are shown.
pub(crate) const SETTINGS: &[Setting] = &[
    setting(
        "metadata.endpoints",
        Both,
        "http://127.0.0.1:2379",
        "etcd's client URLs, separated by commas",
    ),
    setting(
        "metadata.prefix",
        Both,
        "/geminga/",
        "Prefix of every key: one etcd can serve several clusters",
    ),
    setting("metadata.user", Both, "", "User name at etcd; empty: none"),
    setting("metadata.password_file", Both, "", "File with the password of that user"),
    setting(
        "metadata.ca_file",
        Both,
        "",
        "CA certificates (PEM) that etcd's is checked against; makes it TLS",
    ),
    setting("metadata.cert_file", Both, "", "Our own certificate (PEM) for etcd"),
    setting("metadata.key_file", Both, "", "The key of that certificate (PEM)"),
    setting(
        "metadata.lease_ttl_ms",
        Both,
        "5000",
        "Length of this process's lease: a crash is noticed after it at the latest",
    ),
    setting("broker.id", Broker, "", "Name of this broker in the cluster; empty: the host's name"),
    setting("broker.listen", Broker, "127.0.0.1:8650", "Where clients connect"),
    setting(
        "broker.advertise",
        Broker,
        "",
        "host:port that clients are told; empty: the bound address",
    ),
    setting(
        "broker.health_listen",
        Broker,
        "127.0.0.1:8651",
        "Where metrics and health are served",
    ),
    setting(
        "broker.auto_create_topics",
        Broker,
        "false",
        "Whether missing topics are created on first use where their namespace allows it",
    ),
    setting(
        "broker.drain_grace_ms",
        Broker,
        "30000",
        "Time after SIGTERM to hand topics over and to finish what was accepted",
    ),
    setting("bookie.id", Bookie, "", "Name of this bookie in the cluster; empty: the host's name"),
    setting(
        "bookie.data_dir",
        Bookie,
        "./geminga-bookie",
        "Where it keeps everything; made if it is missing",
    ),
    setting("bookie.listen", Bookie, "127.0.0.1:8660", "Where brokers and other bookies connect"),
    setting(
        "bookie.advertise",
        Bookie,
        "",
        "host:port that others are told; empty: the bound address",
    ),
    setting(
        "bookie.health_listen",
        Bookie,
        "127.0.0.1:8651",
        "Where metrics and health are served",
    ),
    setting(
        "bookie.zone",
        Bookie,
        "",
        "Failure domain: copies are spread over zones; empty: none is known",
    ),
    setting(
        "bookie.take_new_incarnation",
        Bookie,
        "false",
        "Let an empty directory take the place of a disk that is gone for good: the old copies count as lost",
    ),
    setting(
        "bookie.drain_grace_ms",
        Bookie,
        "30000",
        "Time after SIGTERM to finish what was accepted",
    ),
    setting(
        "bookie.auto_recovery",
        Bookie,
        "true",
        "Whether this bookie takes part in copying ledgers that lack copies",
    ),
    setting(
        "bookie.lost_after_ms",
        Bookie,
        "600000",
        "Time after which a bookie that is gone is declared lost and its ledgers are copied",
    ),
    setting(
        "bookie.scan_ms",
        Bookie,
        "60000",
        "Time between full scans of all ledgers while a bookie is lost or drained; two that find nothing prove a drain",
    ),
    setting(
        "bookie.copy_bytes_per_second",
        Bookie,
        "52428800",
        "Bytes a second that this bookie copies at most, for ledgers that lack copies",
    ),
    setting("ledger.ensemble", Both, "3", "Bookies that a ledger is spread over"),
    setting("ledger.write_quorum", Both, "3", "Copies of each entry"),
    setting(
        "ledger.ack_quorum",
        Both,
        "2",
        "Synced copies before a receipt; at least 2 in a cluster",
    ),
    setting(
        "ledger.roll_bytes",
        Broker,
        "268435456",
        "A segment's open ledger is closed, and the next one begun, at this size",
    ),
    setting("ledger.roll_ms", Broker, "14400000", "... and at this age"),
    setting(
        "tier.url",
        Broker,
        "",
        "Object storage for cold ledgers: s3://bucket/prefix, gs://, az:// or file:///dir; empty: none. Credentials come from the provider's environment variables",
    ),
    setting(
        "telemetry.otlp_endpoint",
        Both,
        "",
        "Collector that spans are sent to by OTLP over gRPC, http://host:4317; empty: none",
    ),
    setting(
        "telemetry.sample_ratio",
        Both,
        "1",
        "Share of the traces recorded by producers that this process takes part in, 0 to 1",
    ),
    setting(
        "operator.id",
        Operator,
        "",
        "Name of this operator; empty: the host's name. A random suffix makes it one of a kind",
    ),
    setting(
        "operator.namespace",
        Operator,
        "",
        "The namespace whose objects it works on; empty: all of them",
    ),
    setting(
        "operator.health_listen",
        Operator,
        "127.0.0.1:8651",
        "Where metrics and health are served",
    ),
    setting(
        "operator.lease_namespace",
        Operator,
        "default",
        "Namespace of the Lease by which one of several operators works",
    ),
    setting("operator.lease_name", Operator, "geminga-operator", "Name of that Lease"),
    setting(
        "operator.lease_ttl_ms",
        Operator,
        "15000",
        "Length of that Lease: another operator takes over after this much silence; whole seconds",
    ),
    setting(
        "operator.resync_ms",
        Operator,
        "60000",
        "How often every object is compared with what it describes, without any event",
    ),
    setting("log.level", All, "info", "Log filter: a level, or target=level pairs"),
    setting("log.format", All, "pretty", "How log lines look: pretty or json"),
];

/// The setting of this key.
pub(crate) fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

impl Setting {
    /// `GEMINGA_SECTION_NAME`
    pub(crate) fn variable(&self) -> String {
        format!("GEMINGA_{}", self.key.replace('.', "_").to_uppercase())
    }

    /// `section-name`, without dashes before it.
    pub(crate) fn flag(&self) -> String {
        self.key.replace(['.', '_'], "-")
    }

    /// Whether a role reads it.
    pub(crate) fn is_for(&self, role: Reader) -> bool {
        match self.reader {
            All => true,
            Both => matches!(role, Broker | Bookie | Both | All),
            reader => role == All || role == reader,
        }
    }
}
