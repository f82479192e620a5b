//! What the processes tell: metrics, and the spans of a traced message.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Stdio,
    sync::{Arc, Mutex},
};

use geminga_runtime::telemetry::MetricsRegistry;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::harness::{Cluster, ClusterSpec, Load, eventually, geminga};

/// Name -> (type, help).
type Families = BTreeMap<String, (String, String)>;

/// Every family of a page.
fn families(page: &str) -> Families {
    let mut found = Families::new();
    for line in page.lines() {
        let mut words = line.splitn(4, ' ');
        if words.next() != Some("#") {
            continue;
        }
        let (kind, name, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
        let Some(name) = name else { continue };
        let family = found.entry(name.to_owned()).or_default();
        match kind {
            Some("TYPE") => {
                assert!(family.0.is_empty(), "{name} is declared twice");
                rest.clone_into(&mut family.0);
            }
            Some("HELP") => rest.clone_into(&mut family.1),
            _ => {}
        }
    }
    found
}

/// OpenMetrics: an end mark, and every sample of a declared family with the suffix its type allows.
fn assert_open_metrics(page: &str) {
    assert!(page.ends_with("# EOF\n"), "it ends with its end mark");
    let families = families(page);
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split([' ', '{']).next().unwrap_or_default();
        let value = line.rsplit(' ').next().unwrap_or_default();
        assert!(value.parse::<f64>().is_ok(), "a number: {line}");
        let suffixes: &[(&str, &[&str])] = &[
            ("counter", &["_total", "_created"]),
            ("gauge", &[""]),
            ("histogram", &["_bucket", "_sum", "_count", "_created"]),
            ("info", &["_info"]),
            ("unknown", &[""]),
        ];
        let declared = suffixes.iter().any(|(kind, suffixes)| {
            suffixes.iter().any(|suffix| {
                name.strip_suffix(suffix)
                    .and_then(|family| families.get(family))
                    .is_some_and(|family| family.0 == *kind)
            })
        });
        assert!(declared, "of no declared family: {line}");
    }
}

fn markdown(roles: &[(&str, Families)]) -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         Every role serves OpenMetrics text at `/metrics` of its health address. Names of topics are the only labels whose\n\
         number grows with use; they are bounded by the segments a broker serves. This page is made from running processes; a\n\
         test keeps it equal (`UPDATE_DOCS=1 cargo test --test cluster documentation`).\n",
    );
    for (role, families) in roles {
        page += &format!("\n## {role}\n\n| metric | type | meaning |\n|---|---|---|\n");
        for (name, (kind, help)) in families {
            let help = help.trim_end_matches('.').replace('|', "\\|");
            page += &format!("| `{name}` | {kind} | {help} |\n");
        }
    }
    page
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documentation_page_of_metrics_is_what_the_roles_serve() {
    let cluster = Cluster::start(ClusterSpec { brokers: 1, ..ClusterSpec::default() }).await;
    let load = Load::start(&cluster, "orders", 1).await;
    let broker = eventually("the backlog is reported", async || {
        let page = cluster.metrics("broker-0").await?;
        page.contains("\ngeminga_broker_subscription_backlog_age_seconds{").then_some(page)
    })
    .await;
    let bookie = cluster.metrics("bookie-0").await.expect("served");
    for page in [&broker, &bookie] {
        assert_open_metrics(page);
    }
    load.finish(&cluster).await;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    // An operator needs Kubernetes to run in; its figures are there without.
    let registry = MetricsRegistry::new();
    registry.with(geminga_operator::metrics::Metrics::register).fill();
    let operator = registry.encode();
    assert_open_metrics(&operator);
    let roles = [("Broker", &broker), ("Bookie", &bookie), ("Operator", &operator)];
    let made = markdown(&roles.map(|(role, page)| (role, families(page))));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &made).expect("the page can be written");
    }
    let page = std::fs::read_to_string(path).expect("docs/metrics.md exists");
    assert!(page == made, "run: UPDATE_DOCS=1 cargo test --test cluster documentation");
}

/// Receives spans as a collector does.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().expect("no panic");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|r| r.attributes).unwrap_or_default();
            let service = attributes
                .iter()
                .find(|attribute| attribute.key == "service.name")
                .map(|attribute| format!("{:?}", attribute.value))
                .unwrap_or_default();
            for scope in resource.scope_spans {
                spans.extend(scope.spans.into_iter().map(|span| (service.clone(), span)));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_traced_message_is_one_tree_from_its_producer_over_broker_and_bookies_to_its_consumer() {
    let collector = Collector::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let service = TraceServiceServer::new(collector.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let spec = ClusterSpec {
        brokers: 1,
        settings: vec![("telemetry-otlp-endpoint", endpoint.clone())],
        ..ClusterSpec::default()
    };
    let cluster = Cluster::start(spec).await;
    cluster.cli(&["topic", "create", "traced"]).await;
    let run = async |args: &'static [&'static str], input: &'static str| {
        let (servers, endpoint) = (cluster.servers(), endpoint.clone());
        tokio::task::spawn_blocking(move || {
            use std::io::Write;
            let mut child = geminga()
                .env("GEMINGA_SERVER", servers)
                .env("GEMINGA_TELEMETRY_OTLP_ENDPOINT", endpoint)
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("the binary starts");
            let mut stdin = child.stdin.take().expect("piped");
            stdin.write_all(input.as_bytes()).expect("it reads");
            drop(stdin);
            let output = child.wait_with_output().expect("it ends");
            assert!(output.status.success());
            output.stdout
        })
        .await
        .expect("no panic")
    };
    run(&["produce", "traced", "--trace"], "one\n").await;
    let consumed =
        run(&["consume", "traced", "-s", "s", "--from", "earliest", "-n", "1"], "").await;
    assert!(String::from_utf8_lossy(&consumed).contains("one"));

    let names = ["send", "publish", "add", "deliver", "process"];
    let spans = eventually("all spans arrive", async || {
        let spans = collector.0.lock().expect("no panic").clone();
        let found: BTreeSet<&str> = spans.iter().map(|(_, span)| span.name.as_str()).collect();
        let adds = spans.iter().filter(|(_, span)| span.name == "add").count();
        (names.iter().all(|name| found.contains(name)) && adds >= 2).then_some(spans)
    })
    .await;
    let send = &spans.iter().find(|(_, span)| span.name == "send").expect("found").1;
    let publish = &spans.iter().find(|(_, span)| span.name == "publish").expect("found").1;
    for (service, span) in spans.iter().filter(|(_, span)| names.contains(&span.name.as_str())) {
        assert_eq!(span.trace_id, send.trace_id, "one trace: {}", span.name);
        let (parent, of) = match span.name.as_str() {
            "publish" => (&send.span_id, "geminga-broker"),
            "add" => (&publish.span_id, "geminga-bookie"),
            "deliver" => (&send.span_id, "geminga-broker"),
            "process" => (&send.span_id, "geminga-client"),
            _ => continue,
        };
        assert_eq!(&span.parent_span_id, parent, "{} is below its cause", span.name);
        assert!(service.contains(of), "{} is of {service}", span.name);
    }
    serving.abort();
}
