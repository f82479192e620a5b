//! What the server spent, from its own metrics.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// CPU and memory of the server process at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Usage {
    pub(super) cpu_seconds: f64,
    pub(super) rss_bytes: f64,
}

/// Largest metrics page that is read.
const PAGE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Asks `address` (host:port); none when it does not answer within 5 s or does not tell.
pub(super) async fn usage(address: &str) -> Option<Usage> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut page = Vec::new();
        stream.take(PAGE_BYTES_MAX).read_to_end(&mut page).await.ok()?;
        parse(&String::from_utf8_lossy(&page))
    };
    timeout(Duration::from_secs(5), ask).await.ok().flatten()
}

fn parse(page: &str) -> Option<Usage> {
    let value = |name: &str| {
        page.lines().find_map(|line| {
            line.strip_prefix(name)?.strip_prefix(' ')?.split(' ').next()?.parse::<f64>().ok()
        })
    };
    Some(Usage {
        cpu_seconds: value("process_cpu_seconds_total")?,
        rss_bytes: value("process_resident_memory_bytes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_from_the_metrics_page() {
        let page = "HTTP/1.1 200 OK\r\n\r\n# TYPE process_cpu_seconds counter\nprocess_cpu_seconds_total 1.5\nprocess_resident_memory_bytes 2048\n# EOF\n";
        assert_eq!(parse(page), Some(Usage { cpu_seconds: 1.5, rss_bytes: 2048.0 }));
        assert_eq!(parse("nothing"), None);
    }
}
