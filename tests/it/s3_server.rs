//! The object store that the tests use: the embedded one, or a real one that the environment names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs, thread};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use lfs_broker_embedded::s3::{Server, Settings};
use uuid::Uuid;

/// Which store answers. The embedded store answers like AWS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    Embedded,
    Minio,
    Versitygw,
}

/// A running S3 server.
#[derive(Debug, Clone)]
pub(crate) struct S3Server {
    pub(crate) flavour: Flavour,
    pub(crate) endpoint: String,
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: String,
}

/// A fresh bucket on the S3 server, and a client for it.
pub(crate) struct TestBucket {
    pub(crate) server: &'static S3Server,
    pub(crate) client: Client,
    pub(crate) bucket: String,
}

impl TestBucket {
    /// Creates a bucket for one test.
    pub(crate) async fn for_tests() -> Self {
        let server = S3Server::for_tests();
        let client = server.client(&server.secret_access_key);
        let bucket = format!("test-{}", Uuid::new_v4().simple());
        client.create_bucket().bucket(&bucket).send().await.unwrap();
        Self { server, client, bucket }
    }
}

impl S3Server {
    /// The S3 server that every test of this run uses.
    pub(crate) fn for_tests() -> &'static Self {
        static SERVER: OnceLock<S3Server> = OnceLock::new();
        SERVER.get_or_init(|| match env::var("LFS_TEST_S3_ENDPOINT") {
            Ok(endpoint) => Self::from_environment(endpoint),
            Err(_) => Self::embedded(),
        })
    }

    fn from_environment(endpoint: String) -> Self {
        let text = |name: &str| env::var(name).unwrap_or_else(|_| panic!("LFS_TEST_S3_ENDPOINT needs {name}"));
        let flavour = match text("LFS_TEST_S3_FLAVOUR").as_str() {
            "embedded" => Flavour::Embedded,
            "minio" => Flavour::Minio,
            "versitygw" => Flavour::Versitygw,
            other => panic!("LFS_TEST_S3_FLAVOUR is {other:?}, not embedded, minio or versitygw"),
        };
        let (access_key_id, secret_access_key) = (text("LFS_TEST_S3_ACCESS_KEY_ID"), text("LFS_TEST_S3_SECRET_ACCESS_KEY"));
        Self { flavour, endpoint, access_key_id, secret_access_key }
    }

    /// Starts the embedded server on a thread of its own, because it must outlive the runtime of the first test.
    fn embedded() -> Self {
        let settings = Settings {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            root: fresh_root(),
            access_key_id: "embedded-test".to_owned(),
            secret_access_key: "embedded-test-secret".to_owned(),
        };
        let (access_key_id, secret_access_key) = (settings.access_key_id.clone(), settings.secret_access_key.clone());
        let (started, endpoint) = std::sync::mpsc::channel();
        let work = async move {
            let server = Server::start(settings).await.unwrap();
            started.send(server.endpoint()).unwrap();
            // The server runs until the process exits.
            std::future::pending::<()>().await;
        };
        thread::spawn(|| {
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
        });
        Self { flavour: Flavour::Embedded, endpoint: endpoint.recv().unwrap(), access_key_id, secret_access_key }
    }

    /// A client that signs with `secret` and does not retry.
    pub(crate) fn client(&self, secret: &str) -> Client {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .credentials_provider(Credentials::new(&self.access_key_id, secret, None, None, "test"))
            .region(Region::new("us-east-1"))
            .endpoint_url(&self.endpoint)
            .force_path_style(true)
            .retry_config(RetryConfig::disabled())
            .build();
        Client::from_conf(config)
    }
}

/// A fresh directory for this run. Nothing runs when a test binary exits, so each run removes the directories of earlier runs.
fn fresh_root() -> PathBuf {
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("embedded-s3");
    fs::create_dir_all(&all).unwrap();
    for root in fs::read_dir(&all).unwrap().flatten() {
        let lock = fs::File::open(root.path().join("lock"));
        if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            // Another run may remove the same directory at the same time.
            let _ = fs::remove_dir_all(root.path());
        }
    }
    all.join(Uuid::new_v4().simple().to_string())
}
