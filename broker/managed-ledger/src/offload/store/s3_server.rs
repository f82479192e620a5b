//! A small S3 server in this process, over a directory.

use geminga_runtime::tasks::Tasks;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use object_store::aws::AmazonS3Builder;
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;

pub(crate) const BUCKET: &str = "cold";
const KEY: &str = "an-access-key";
const SECRET: &str = "a-secret-key";

/// Serves until `tasks` ends; how to reach its one bucket.
pub(crate) async fn start(directory: &std::path::Path, tasks: &Tasks) -> AmazonS3Builder {
    std::fs::create_dir_all(directory.join(BUCKET)).expect("a bucket");
    let mut service = S3ServiceBuilder::new(FileSystem::new(directory).expect("a directory"));
    service.set_auth(SimpleAuth::from_single(KEY, SECRET));
    let service = service.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let connections = tasks.clone();
    tasks.spawn("s3", async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service.clone();
            connections.spawn("s3-connection", async move {
                let http = Builder::new(TokioExecutor::new());
                let _ = http.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    AmazonS3Builder::new()
        .with_endpoint(format!("http://{address}"))
        .with_region("us-east-1")
        .with_access_key_id(KEY)
        .with_secret_access_key(SECRET)
}
