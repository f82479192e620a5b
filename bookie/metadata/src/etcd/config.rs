//! Where etcd is and how to talk to it.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

/// The longest prefix: what is left of etcd's request limit beyond [`crate::TXN_BYTES_MAX`] pays for it, once a key.
pub const PREFIX_BYTES_MAX: usize = 128;
/// etcd drops a connection that pings more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// A connection whose ping is not answered for so long is dead; its watches are cut.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// The kernel's own probes of an idle connection, which etcd does not see.
const TCP_KEEPALIVE: Duration = Duration::from_secs(10);

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the text in.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Files in PEM form. Read whenever a connection is made anew after a failure, so renewed certificates take effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// The authority that signed etcd's certificate. No other is trusted.
    pub ca_file: PathBuf,
    /// Our own certificate and its key, if etcd asks for one.
    pub client: Option<(PathBuf, PathBuf)>,
    /// The name that etcd's certificate must carry; none means the host of the endpoint.
    pub domain: Option<String>,
}

/// How to reach etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://host:port` or `https://host:port` of one or more members of one etcd cluster, at most 16.
    pub endpoints: Vec<String>,
    /// Which of the endpoints is asked first (modulo their number). Give each process another, so that the members share
    /// the load; the others are asked when this one fails.
    pub first: usize,
    /// What every key starts with in etcd, `/geminga/<cluster name>/`: several clusters may share one etcd. Printable
    /// ASCII that ends in `/`, at most [`PREFIX_BYTES_MAX`] bytes. Never changes in a cluster's life.
    pub prefix: String,
    /// Name and password, where etcd has authentication on.
    pub user: Option<(String, Secret)>,
    /// For `https` endpoints.
    pub tls: Option<EtcdTls>,
    /// How long a call may take, all tries on all endpoints together; 3 s by default. Kept above zero.
    pub request_deadline: Duration,
    /// How long the making of one connection may take; 1 s by default.
    pub connect_timeout: Duration,
}

impl EtcdConfig {
    /// These endpoints and this prefix; no user, no TLS, 3 s for a call and 1 s for a connection.
    #[must_use]
    pub fn new(
        endpoints: impl IntoIterator<Item = impl Into<String>>,
        prefix: impl Into<String>,
    ) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            first: 0,
            prefix: prefix.into(),
            user: None,
            tls: None,
            request_deadline: Duration::from_secs(3),
            connect_timeout: Duration::from_secs(1),
        }
    }
}

/// What is wrong with the configuration. No retry helps.
#[derive(Debug, thiserror::Error)]
pub enum EtcdConfigError {
    /// None given, or more than 16.
    #[error("etcd needs 1 to 16 endpoints, {0} are given")]
    Endpoints(usize),
    /// Not `http://host:port` or `https://host:port`.
    #[error("{0} is not an etcd endpoint: write http://host:port or https://host:port")]
    Endpoint(String),
    /// `https` without an authority to trust, or `http` with one.
    #[error("{0}: https needs a CA file, and http cannot have one")]
    Tls(String),
    /// See [`EtcdConfig::prefix`].
    #[error(
        "{0} is not a prefix of keys: write /geminga/<cluster name>/, at most {PREFIX_BYTES_MAX} bytes"
    )]
    Prefix(String),
    /// A wait of no length cannot be kept.
    #[error("the request deadline and the connect timeout must be longer than zero")]
    Deadline,
    /// A TLS file could not be read.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: std::io::Error,
    },
}

impl EtcdConfig {
    /// Looks at everything that can be known to be wrong without etcd.
    pub(super) fn check(&self) -> Result<(), EtcdConfigError> {
        if self.endpoints.is_empty() || self.endpoints.len() > 16 {
            return Err(EtcdConfigError::Endpoints(self.endpoints.len()));
        }
        for endpoint in &self.endpoints {
            let uri = endpoint.parse::<tonic::transport::Uri>().ok();
            let scheme = uri.as_ref().and_then(|uri| uri.scheme_str());
            let authority = uri.as_ref().and_then(|uri| uri.authority());
            match (scheme, authority) {
                (Some("http"), Some(_)) if self.tls.is_none() => {}
                (Some("https"), Some(_)) if self.tls.is_some() => {}
                (Some("http" | "https"), Some(_)) => {
                    return Err(EtcdConfigError::Tls(endpoint.clone()));
                }
                _ => return Err(EtcdConfigError::Endpoint(endpoint.clone())),
            }
        }
        let prefix = self.prefix.as_bytes();
        let printable = prefix.iter().all(u8::is_ascii_graphic);
        if prefix.len() > PREFIX_BYTES_MAX || !printable || prefix.last() != Some(&b'/') {
            return Err(EtcdConfigError::Prefix(self.prefix.clone()));
        }
        if self.request_deadline.is_zero() || self.connect_timeout.is_zero() {
            return Err(EtcdConfigError::Deadline);
        }
        Ok(())
    }

    /// What etcd's client is told; reads the TLS files.
    pub(super) async fn options(&self) -> Result<ConnectOptions, EtcdConfigError> {
        // No HTTP/2 pings while idle: etcd counts those without an open stream as abuse and drops the connection. A watch
        // keeps a stream open; without one, a connection that died in silence costs the next call its deadline.
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.connect_timeout)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(TCP_KEEPALIVE)
            .with_require_leader(true);
        if let Some((name, password)) = &self.user {
            options = options.with_user(name.clone(), password.0.clone());
            options = options.with_auto_token_refresh(true);
        }
        if let Some(tls) = &self.tls {
            let ca = Certificate::from_pem(read(&tls.ca_file).await?);
            let mut settings = TlsOptions::new().ca_certificate(ca);
            if let Some((certificate, key)) = &tls.client {
                let identity = Identity::from_pem(read(certificate).await?, read(key).await?);
                settings = settings.identity(identity);
            }
            if let Some(domain) = &tls.domain {
                settings = settings.domain_name(domain.clone());
            }
            options = options.with_tls(settings);
        }
        Ok(options)
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, EtcdConfigError> {
    let file = tokio::fs::read(path).await;
    file.map_err(|error| EtcdConfigError::File { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_told_at_once_and_by_name() {
        let good = EtcdConfig::new(["http://127.0.0.1:2379"], "/geminga/a/");
        assert!(good.check().is_ok());
        for prefix in ["", "/geminga/a", "/gem inga/", "/\u{e4}/", &"/".repeat(129)] {
            let config = EtcdConfig::new(["http://127.0.0.1:2379"], prefix);
            assert!(matches!(config.check(), Err(EtcdConfigError::Prefix(_))), "{prefix}");
        }
        for endpoint in ["127.0.0.1:2379", "ftp://a:1", "http://", "", "/"] {
            let config = EtcdConfig::new([endpoint], "/g/");
            assert!(matches!(config.check(), Err(EtcdConfigError::Endpoint(_))), "{endpoint}");
        }
        let none: [&str; 0] = [];
        let none = EtcdConfig::new(none, "/g/").check();
        assert!(matches!(none, Err(EtcdConfigError::Endpoints(0))));
        let bare = EtcdConfig::new(["https://a:2379"], "/g/");
        assert!(matches!(bare.check(), Err(EtcdConfigError::Tls(_))));
        let mut zero = good;
        zero.request_deadline = Duration::ZERO;
        assert!(matches!(zero.check(), Err(EtcdConfigError::Deadline)));
    }

    #[tokio::test]
    async fn a_missing_tls_file_is_named() {
        let tls = EtcdTls { ca_file: "/no/such/ca.pem".into(), client: None, domain: None };
        let mut config = EtcdConfig::new(["https://a:2379"], "/g/");
        config.tls = Some(tls);
        let error = config.options().await.expect_err("there is no such file").to_string();
        assert!(error.contains("/no/such/ca.pem"), "{error}");
    }

    #[test]
    fn a_password_is_never_printed() {
        let mut config = EtcdConfig::new(["http://a:2379"], "/g/");
        config.user = Some(("root".to_owned(), Secret::new("hunter2")));
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
