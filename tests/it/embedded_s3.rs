//! What the embedded object store does beyond S3: its files, its restarts, and browser access.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumMode, CompletedMultipartUpload, CompletedPart};
use lfs_broker_embedded::s3::{Error, Server, Settings};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::s3_server::{Flavour, S3Server};

/// An embedded server for one test. Its directory outlives the server.
struct EmbeddedS3 {
    directory: TempDir,
    server: Option<Server>,
    client: aws_sdk_s3::Client,
}

const BUCKET: &str = "bucket";

impl EmbeddedS3 {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (server, client) = start(directory.path()).await;
        Self { directory, server: Some(server), client }
    }

    async fn restart(&mut self) {
        self.server.take().unwrap().stop().await;
        let (server, client) = start(self.directory.path()).await;
        (self.server, self.client) = (Some(server), client);
    }

    async fn put(&self, key: &str, body: &'static [u8]) {
        let body = ByteStream::from_static(body);
        self.client.put_object().bucket(BUCKET).key(key).body(body).metadata("name", "value").send().await.unwrap();
    }

    async fn get(&self, key: &str) -> Vec<u8> {
        let found = self.client.get_object().bucket(BUCKET).key(key).send().await.unwrap();
        found.body.collect().await.unwrap().to_vec()
    }

    /// How many files hold bytes of objects, of parts, or of bodies in flight.
    fn content_files(&self) -> usize {
        std::fs::read_dir(self.directory.path().join("content")).unwrap().count()
    }
}

fn settings(root: &Path) -> Settings {
    Settings {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        root: root.to_owned(),
        access_key_id: "own".to_owned(),
        secret_access_key: "own-secret".to_owned(),
    }
}

async fn start(root: &Path) -> (Server, aws_sdk_s3::Client) {
    let Settings { access_key_id, secret_access_key, .. } = settings(root);
    let server = Server::start(settings(root)).await.unwrap();
    server.create_bucket(BUCKET).await.unwrap();
    let endpoint = server.endpoint();
    let s3 = S3Server { flavour: Flavour::Embedded, endpoint, access_key_id, secret_access_key };
    let client = s3.client(&s3.secret_access_key);
    (server, client)
}

/// Waits up to a minute until the condition holds.
async fn wait_until(description: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(60), "{description} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn objects_and_uploads_survive_a_restart() {
    let mut embedded = EmbeddedS3::new().await;
    embedded.put("key", b"the bytes").await;
    embedded.put("gone", b"gone").await;
    embedded.client.delete_object().bucket(BUCKET).key("gone").send().await.unwrap();
    let created = embedded.client.create_multipart_upload().bucket(BUCKET).key("large").send().await.unwrap();
    let id = created.upload_id.unwrap();
    let part = embedded.client.upload_part().bucket(BUCKET).key("large").upload_id(&id).part_number(1);
    let sent = part.body(ByteStream::from_static(b"the part")).send().await.unwrap();
    embedded.restart().await;
    assert_eq!(embedded.get("key").await, b"the bytes");
    let found =
        embedded.client.head_object().bucket(BUCKET).key("key").checksum_mode(ChecksumMode::Enabled).send().await.unwrap();
    assert_eq!(found.metadata.unwrap()["name"], "value");
    assert!(found.checksum_crc32.is_some());
    assert!(embedded.client.head_object().bucket(BUCKET).key("gone").send().await.is_err());
    let part = CompletedPart::builder().part_number(1).set_e_tag(sent.e_tag).build();
    let list = CompletedMultipartUpload::builder().parts(part).build();
    let request = embedded.client.complete_multipart_upload().bucket(BUCKET).key("large").upload_id(&id);
    request.multipart_upload(list).send().await.unwrap();
    embedded.restart().await;
    assert_eq!(embedded.get("large").await, b"the part");
}

#[tokio::test]
async fn bytes_without_an_object_or_upload_are_removed() {
    let embedded = EmbeddedS3::new().await;
    embedded.put("key", b"first").await;
    embedded.put("key", b"second").await;
    assert_eq!(embedded.content_files(), 1);
    let created = embedded.client.create_multipart_upload().bucket(BUCKET).key("large").send().await.unwrap();
    let id = created.upload_id.unwrap();
    for body in [b"part", b"trap"] {
        let part = embedded.client.upload_part().bucket(BUCKET).key("large").upload_id(&id).part_number(1);
        part.body(ByteStream::from_static(body)).send().await.unwrap();
    }
    assert_eq!(embedded.content_files(), 2);
    embedded.client.abort_multipart_upload().bucket(BUCKET).key("large").upload_id(&id).send().await.unwrap();
    embedded.client.delete_object().bucket(BUCKET).key("key").send().await.unwrap();
    assert_eq!(embedded.content_files(), 0);
}

#[tokio::test]
async fn files_that_a_crash_left_are_removed_at_the_next_start() {
    let mut embedded = EmbeddedS3::new().await;
    embedded.put("key", b"the bytes").await;
    let root = embedded.directory.path().to_owned();
    embedded.server.take().unwrap().stop().await;
    let stray = [root.join("content/half-a-body"), root.join("new/half-a-record")];
    stray.iter().for_each(|path| std::fs::write(path, "left").unwrap());
    // The creation of this bucket was interrupted.
    std::fs::create_dir_all(root.join("buckets/unfinished/objects")).unwrap();
    let (server, client) = start(&root).await;
    (embedded.server, embedded.client) = (Some(server), client);
    assert!(stray.iter().all(|path| !path.exists()));
    assert_eq!((embedded.content_files(), embedded.get("key").await), (1, b"the bytes".to_vec()));
    assert!(embedded.client.head_bucket().bucket("unfinished").send().await.is_err());
    embedded.client.create_bucket().bucket("unfinished").send().await.unwrap();
}

#[tokio::test]
async fn an_upload_that_was_completed_at_the_crash_is_not_listed_again() {
    let mut embedded = EmbeddedS3::new().await;
    let created = embedded.client.create_multipart_upload().bucket(BUCKET).key("key").send().await.unwrap();
    let id = created.upload_id.unwrap();
    let part = embedded.client.upload_part().bucket(BUCKET).key("key").upload_id(&id).part_number(1);
    let sent = part.body(ByteStream::from_static(b"the part")).send().await.unwrap();
    let (upload, saved) = (embedded.directory.path().join("uploads").join(&id), embedded.directory.path().join("saved"));
    std::fs::create_dir(&saved).unwrap();
    let copy = |from: &PathBuf, to: &PathBuf| {
        for entry in std::fs::read_dir(from).unwrap().flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    };
    copy(&upload, &saved);
    let part = CompletedPart::builder().part_number(1).set_e_tag(sent.e_tag).build();
    let list = CompletedMultipartUpload::builder().parts(part).build();
    let request = embedded.client.complete_multipart_upload().bucket(BUCKET).key("key").upload_id(&id);
    request.multipart_upload(list).send().await.unwrap();
    embedded.server.take().unwrap().stop().await;
    // As if the crash came after the object's record was written and before the upload was removed.
    std::fs::create_dir(&upload).unwrap();
    copy(&saved, &upload);
    let (server, client) = start(embedded.directory.path()).await;
    (embedded.server, embedded.client) = (Some(server), client);
    let listed = embedded.client.list_multipart_uploads().bucket(BUCKET).send().await.unwrap();
    assert_eq!(listed.uploads().len(), 0);
    assert_eq!(embedded.get("key").await, b"the part");
}

#[tokio::test]
async fn a_put_that_breaks_off_leaves_no_bytes() {
    let embedded = EmbeddedS3::new().await;
    let request = embedded.client.put_object().bucket(BUCKET).key("key").content_length(1_000_000);
    let presigned = request.presigned(minutes(10)).await.unwrap();
    let url = reqwest::Url::parse(presigned.uri()).unwrap();
    let mut stream = TcpStream::connect(embedded.server.as_ref().unwrap().address()).await.unwrap();
    let host = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
    let head = format!("PUT {}?{} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000000\r\n\r\n", url.path(), url.query().unwrap());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&[1; 600_000]).await.unwrap();
    wait_until("a file for the body", || embedded.content_files() == 1).await;
    drop(stream);
    wait_until("the removal of the body", || embedded.content_files() == 0).await;
    assert!(embedded.client.head_object().bucket(BUCKET).key("key").send().await.is_err());
}

#[tokio::test]
async fn a_reader_gets_the_whole_object_even_if_it_is_deleted_meanwhile() {
    let embedded = EmbeddedS3::new().await;
    let body = vec![7; 8 << 20];
    embedded.client.put_object().bucket(BUCKET).key("key").body(body.clone().into()).send().await.unwrap();
    let found = embedded.client.get_object().bucket(BUCKET).key("key").send().await.unwrap();
    embedded.client.delete_object().bucket(BUCKET).key("key").send().await.unwrap();
    assert!(found.body.collect().await.unwrap().to_vec() == body);
    wait_until("the removal of the bytes", || embedded.content_files() == 0).await;
}

#[tokio::test]
async fn no_key_is_used_as_a_path() {
    let embedded = EmbeddedS3::new().await;
    let keys = ["../../escape", "/etc/passwd", "a/../b", "..", ".", "nul\u{1}", "long/".repeat(200).leak()];
    for key in keys {
        embedded.put(key, b"the bytes").await;
        assert_eq!(embedded.get(key).await, b"the bytes", "{key}");
    }
    assert_eq!(embedded.content_files(), keys.len());
    let names = std::fs::read_dir(embedded.directory.path()).unwrap().flatten().map(|entry| entry.file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["buckets", "content", "lock", "new", "uploads"]);
}

#[tokio::test]
async fn a_directory_has_one_server_and_its_secret_is_not_printed() {
    let embedded = EmbeddedS3::new().await;
    let second = Server::start(settings(embedded.directory.path())).await;
    assert!(matches!(second, Err(Error::InUse(_))));
    assert!(!format!("{:?}", settings(embedded.directory.path())).contains("own-secret"));
    let server = embedded.server.as_ref().unwrap();
    server.create_bucket(BUCKET).await.unwrap();
    assert!(matches!(server.create_bucket("../up").await, Err(Error::BucketName(_))));
}

#[tokio::test]
async fn a_page_of_any_origin_may_put_and_read_the_etag() {
    let embedded = EmbeddedS3::new().await;
    let presigned =
        embedded.client.put_object().bucket(BUCKET).key("key").if_none_match("*").presigned(minutes(10)).await.unwrap();
    let requested_headers = "content-type,if-none-match,x-amz-checksum-sha256,x-amz-meta-lfs-upload-id";
    let client = reqwest::Client::new();
    let preflight = |method: &str| {
        let request = client.request(reqwest::Method::OPTIONS, presigned.uri()).header("origin", "https://app.example");
        request.header("access-control-request-method", method).header("access-control-request-headers", requested_headers).send()
    };
    let response = preflight("PUT").await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    assert_eq!(response.headers()["access-control-allow-methods"], "GET, PUT, HEAD");
    assert_eq!(response.headers()["access-control-allow-headers"], requested_headers);
    assert_eq!(preflight("DELETE").await.unwrap().status(), 403);
    for status in [200, 412] {
        let request = client.put(presigned.uri()).header("origin", "https://app.example").header("if-none-match", "*");
        let response = request.body("the bytes").send().await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["access-control-allow-origin"], "*");
        assert_eq!(response.headers()["access-control-expose-headers"], "ETag");
    }
}

#[tokio::test]
async fn a_request_under_a_foreign_host_name_is_refused() {
    let embedded = EmbeddedS3::new().await;
    let url = embedded.server.as_ref().unwrap().endpoint();
    let get = async |host: &str| {
        let response = reqwest::Client::new().get(&url).header("host", host).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let (status, text) = get("evil.example").await;
    assert!(status == 403 && text.contains("names of this machine"), "{status} {text}");
    assert!(!get("localhost").await.1.contains("names of this machine"));
}

#[tokio::test]
async fn unsupported_requests_are_refused_and_not_ignored() {
    let embedded = EmbeddedS3::new().await;
    let code = |error: aws_sdk_s3::Error| aws_sdk_s3::error::ProvideErrorMetadata::code(&error).unwrap_or_default().to_owned();
    let website = embedded.client.get_bucket_website().bucket(BUCKET).send().await;
    assert_eq!(code(website.unwrap_err().into()), "NotImplemented");
    let body = || ByteStream::from_static(b"the bytes");
    let secret = embedded.client.put_object().bucket(BUCKET).key("key").body(body());
    let secret = secret.server_side_encryption(aws_sdk_s3::types::ServerSideEncryption::AwsKms).send().await;
    assert_eq!(code(secret.unwrap_err().into()), "NotImplemented");
    let version = embedded.client.get_object().bucket(BUCKET).key("key").version_id("another").send().await;
    assert_eq!(code(version.unwrap_err().into()), "InvalidArgument");
    let address = embedded.server.as_ref().unwrap().endpoint();
    let form =
        reqwest::Client::new().post(format!("{address}/{BUCKET}")).header("content-type", "multipart/form-data; boundary=x");
    let posted = form.body("--x--").send().await.unwrap();
    assert_eq!(posted.status(), 501);
    let old = reqwest::get(format!("{address}/{BUCKET}/key?AWSAccessKeyId=own&Expires=9999999999&Signature=x")).await.unwrap();
    assert_eq!(old.status(), 400);
}

#[tokio::test]
async fn a_large_body_that_is_refused_early_still_gets_its_response() {
    let embedded = EmbeddedS3::new().await;
    let presigned = embedded.client.put_object().bucket(BUCKET).key("key").presigned(minutes(10)).await.unwrap();
    let request = reqwest::Client::new().put(presigned.uri()).header("x-amz-meta-extra", "unsigned");
    let response = request.body(vec![1; 32 << 20]).send().await.unwrap();
    assert_eq!(response.status(), 403);
    let forged = presigned.uri().replace("key?", "other?");
    assert_eq!(reqwest::Client::new().put(forged).body(vec![1; 32 << 20]).send().await.unwrap().status(), 403);
}

#[tokio::test]
async fn a_stopping_server_finishes_requests_but_does_not_wait_for_idle_connections() {
    let mut embedded = EmbeddedS3::new().await;
    let address = embedded.server.as_ref().unwrap().address();
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"OPTIONS / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut response = [0; 12];
    idle.read_exact(&mut response).await.unwrap();
    assert_eq!(&response, b"HTTP/1.1 403");
    let started = Instant::now();
    embedded.server.take().unwrap().stop().await;
    // A server that waits for its connections gives up after 5 s.
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(TcpStream::connect(address).await.is_err());
}

fn minutes(minutes: u64) -> aws_sdk_s3::presigning::PresigningConfig {
    aws_sdk_s3::presigning::PresigningConfig::expires_in(Duration::from_secs(minutes * 60)).unwrap()
}
