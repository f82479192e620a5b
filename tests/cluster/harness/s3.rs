//! An S3 server as a process.

use std::{fs, path::PathBuf, process::Command};

use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, aws::AmazonS3Builder};

use super::{Process, eventually, free_port, tool};

/// A real S3 server over a directory, with one bucket: `geminga`.
pub(crate) struct S3 {
    pub(crate) process: Process,
    directory: PathBuf,
    port: u16,
}

const ACCESS_KEY: &str = "geminga-test";
const SECRET_KEY: &str = "geminga-test-secret";

impl S3 {
    pub(crate) async fn start(directory: &std::path::Path) -> Self {
        let port = free_port();
        fs::create_dir_all(directory.join("s3/geminga")).expect("a bucket");
        let process = Self::spawn(directory, port);
        let s3 = Self { process, directory: directory.to_owned(), port };
        s3.answers().await;
        s3
    }

    fn spawn(directory: &std::path::Path, port: u16) -> Process {
        let mut command = Command::new(tool("versitygw"));
        command
            .env("ROOT_ACCESS_KEY", ACCESS_KEY)
            .env("ROOT_SECRET_KEY", SECRET_KEY)
            .args(["--port", &format!("127.0.0.1:{port}"), "posix"])
            .arg(directory.join("s3"));
        Process::start("s3", command, directory)
    }

    pub(crate) async fn restart(&mut self) {
        self.process = Self::spawn(&self.directory, self.port);
        self.answers().await;
    }

    async fn answers(&self) {
        let address = format!("127.0.0.1:{}", self.port);
        eventually("the S3 server answers", async || {
            tokio::net::TcpStream::connect(&address).await.is_ok().then_some(())
        })
        .await;
    }

    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
    }

    /// Gets every object whole, one after the other: bytes, seconds.
    #[allow(dead_code, reason = "only the measurements use it")]
    pub(crate) async fn get_all(&self) -> (u64, f64) {
        let store = AmazonS3Builder::new()
            .with_bucket_name("geminga")
            .with_access_key_id(ACCESS_KEY)
            .with_secret_access_key(SECRET_KEY)
            .with_region("us-east-1")
            .with_endpoint(format!("http://127.0.0.1:{}", self.port))
            .with_allow_http(true)
            .build()
            .expect("a valid description");
        let objects: Vec<_> = store.list(None).try_collect().await.expect("listed");
        let (begun, mut bytes) = (tokio::time::Instant::now(), 0);
        for object in objects {
            let body = store.get(&object.location).await.expect("found").bytes().await;
            bytes += body.expect("read").len() as u64;
        }
        (bytes, begun.elapsed().as_secs_f64())
    }
}
