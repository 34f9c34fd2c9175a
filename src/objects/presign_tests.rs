//! Tests of the presigned URLs.

use super::super::Settings;
use super::*;

const MINUTE: Duration = Duration::from_secs(60);

async fn objects() -> Objects {
    let settings = Settings {
        endpoint: Some("http://127.0.0.1:9".to_owned()),
        public_endpoint: Some("https://s3.example.net".to_owned()),
        region: Some("eu-central-1".to_owned()),
        access_key_id: Some("OWN".to_owned()),
        secret_access_key: Some("own-secret".to_owned()),
        signing_access_key_id: Some("WRITER".to_owned()),
        signing_secret_access_key: Some("writer-secret".to_owned()),
        ..Settings::default()
    };
    Objects::connect(&settings).await.unwrap()
}

/// The names in `X-Amz-SignedHeaders`.
fn signed_headers(url: &str) -> Vec<String> {
    parameter(url, "X-Amz-SignedHeaders").split("%3B").map(str::to_owned).collect()
}

fn parameter<'a>(url: &'a str, name: &str) -> &'a str {
    let (_, query) = url.split_once('?').unwrap();
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap()
}

/// The path and the parameters of a URL, in any order.
fn pieces(url: &str) -> Vec<&str> {
    let mut pieces: Vec<&str> = url.split(['?', '&']).collect();
    pieces[1..].sort_unstable();
    pieces
}

/// The validity that the whole SDK needs to sign as this URL was signed.
fn presigning_of(url: &str) -> PresigningConfig {
    let format = time::macros::format_description!("[year][month][day]T[hour][minute][second]Z");
    let signed_at = time::PrimitiveDateTime::parse(parameter(url, "X-Amz-Date"), format).unwrap().assume_utc();
    let expires_in = Duration::from_secs(parameter(url, "X-Amz-Expires").parse().unwrap());
    PresigningConfig::builder().start_time(signed_at.into()).expires_in(expires_in).build().unwrap()
}

fn signer(endpoint: Option<&str>) -> (Signer, Client) {
    let credentials = Credentials::new("TEMP", "secret", Some("ses/si+on=".to_owned()), None, "test");
    let mut config = aws_sdk_s3::Config::builder()
        .behavior_version(aws_config::BehaviorVersion::v2026_01_12())
        .region(aws_sdk_s3::config::Region::new("eu-west-3"));
    config.set_endpoint_url(endpoint.map(str::to_owned));
    config.set_force_path_style(endpoint.map(|_| true));
    let client = Client::from_conf(config.clone().credentials_provider(credentials.clone()).build());
    (Signer::new(config, SharedCredentialsProvider::new(credentials)), client)
}

#[tokio::test]
async fn urls_are_those_of_the_whole_sdk() {
    let digest = Digest::from(Sha256::of(b"hello"));
    for endpoint in [None, Some("https://s3.example.net"), Some("http://127.0.0.1:9000/base")] {
        let (signer, client) = signer(endpoint);
        for key in ["acme/videos/lfs/1", "a b/../c//d%20é/+~*'(1)!=&?;@:,$/e.f"] {
            let location = ObjectLocation { bucket: "bucket".to_owned(), key: key.to_owned() };
            let object = NewObject {
                location: &location,
                token: "0190",
                content_type: "video/mp4; codecs=\"a,b\"",
                size_bytes: 5,
                digest: Some(&digest),
                kms_key_id: Some("key-1"),
            };
            let signed = signer.put(&object, MINUTE).await.unwrap();
            let put = client.put_object().bucket("bucket").key(key).content_length(5).content_type(object.content_type);
            let put = put.if_none_match("*").metadata(TOKEN_KEY, "0190").checksum_sha256(digest.base64());
            let put = put.server_side_encryption(aws_sdk_s3::types::ServerSideEncryption::AwsKms).ssekms_key_id("key-1");
            let expected = put.presigned(presigning_of(&signed.url)).await.unwrap();
            assert_eq!(pieces(&signed.url), pieces(expected.uri()));
            let part = signer.part(&location, "up+load/1", 7, 5, Some(&Sha256::of(b"hello")), MINUTE).await.unwrap();
            let upload_part = client.upload_part().bucket("bucket").key(key).upload_id("up+load/1").part_number(7);
            let upload_part = upload_part.content_length(5).checksum_sha256(digest.base64());
            let expected = upload_part.presigned(presigning_of(&part.url)).await.unwrap();
            assert_eq!(pieces(&part.url), pieces(expected.uri()));
            let query = vec![("versionId", "v/1".into()), ("x-id", "GetObject".into())];
            let get = signer.sign("GET", &location, query, BTreeMap::new(), MINUTE).await.unwrap();
            let expected = client.get_object().bucket("bucket").key(key).version_id("v/1");
            let expected = expected.presigned(presigning_of(&get.url)).await.unwrap();
            assert_eq!(pieces(&get.url), pieces(expected.uri()));
        }
    }
}

fn location() -> ObjectLocation {
    ObjectLocation { bucket: "bucket".to_owned(), key: "acme/videos/lfs/1".to_owned() }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test]
async fn a_presigned_put_signs_every_declared_property_as_a_header() {
    let (location, digest) = (location(), Digest::from(Sha256::of(b"hello")));
    let object = NewObject {
        location: &location,
        token: "0190",
        content_type: "video/mp4",
        size_bytes: 5,
        digest: Some(&digest),
        kms_key_id: Some("key-1"),
    };
    let signed = objects().await.presign_put(&object, MINUTE).await.unwrap();
    assert_eq!(
        signed.headers,
        map(&[
            ("content-length", "5"),
            ("content-type", "video/mp4"),
            ("if-none-match", "*"),
            ("x-amz-checksum-sha256", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
            ("x-amz-meta-lfs-upload-id", "0190"),
            ("x-amz-server-side-encryption", "aws:kms"),
            ("x-amz-server-side-encryption-aws-kms-key-id", "key-1"),
        ])
    );
    let names: Vec<String> = signed_headers(&signed.url).into_iter().filter(|name| name != "host").collect();
    assert_eq!(names, signed.headers.keys().cloned().collect::<Vec<_>>());
    assert!(signed.url.starts_with("https://s3.example.net/bucket/acme/videos/lfs/1?"), "{}", signed.url);
    assert!(signed.url.contains("X-Amz-Credential=WRITER%2F") && signed.url.contains("X-Amz-Expires=60&"));
    assert!(!signed.url.contains("checksum-sha256="), "{}", signed.url);
    assert!(!format!("{signed:?}").contains("http"));
}

#[tokio::test]
async fn a_presigned_put_signs_the_checksum_header_of_its_algorithm() {
    let (objects, location) = (objects().await, location());
    for algorithm in Algorithm::ALL {
        let mut hasher = algorithm.hasher();
        hasher.update(b"hello");
        let digest = hasher.finish();
        let object = NewObject {
            location: &location,
            token: "0190",
            content_type: "a/b",
            size_bytes: 5,
            digest: Some(&digest),
            kms_key_id: None,
        };
        let mut expected = map(&[
            ("content-length", "5"),
            ("content-type", "a/b"),
            ("if-none-match", "*"),
            ("x-amz-meta-lfs-upload-id", "0190"),
        ]);
        if let Some(header) = algorithm.header() {
            expected.insert(header.to_owned(), digest.base64());
        }
        assert_eq!(objects.presign_put(&object, MINUTE).await.unwrap().headers, expected, "{algorithm}");
    }
}

#[tokio::test]
async fn a_presigned_part_signs_its_size_and_its_sha256() {
    let (objects, location) = (objects().await, location());
    let sha256 = Sha256::of(b"hello");
    let signed = objects.presign_part(&location, "up load", 7, 5, Some(&sha256), MINUTE).await.unwrap();
    assert_eq!(signed.headers, map(&[("content-length", "5"), ("x-amz-checksum-sha256", &sha256.base64())]));
    assert!(signed.url.contains("partNumber=7&uploadId=up%20load"), "{}", signed.url);
    let signed = objects.presign_part(&location, "u", 7, 0, None, MINUTE).await.unwrap();
    assert_eq!(signed.headers, map(&[("content-length", "0")]));
}

#[tokio::test]
async fn a_presigned_get_is_a_download_signed_with_the_brokers_own_key() {
    let signed =
        objects().await.presign_get(&location(), Some("v1"), Some("a b.svg"), Some("image/svg+xml"), MINUTE).await.unwrap();
    assert_eq!((signed.method, signed.headers.len()), ("GET", 0));
    for piece in [
        "https://s3.example.net/bucket/acme/videos/lfs/1?",
        "X-Amz-Credential=OWN%2F",
        "versionId=v1",
        "response-content-disposition=attachment%3B%20filename%3D%22a%20b.svg%22",
        "response-content-type=application%2Foctet-stream",
        "response-content-encoding=identity",
    ] {
        assert!(signed.url.contains(piece), "{piece} in {}", signed.url);
    }
    let signed = objects().await.presign_get(&location(), None, None, Some("video/mp4"), MINUTE).await.unwrap();
    assert!(signed.url.contains("response-content-type=video%2Fmp4"), "{}", signed.url);
    let signed = objects().await.presign_get(&location(), None, None, None, MINUTE).await.unwrap();
    assert!(signed.url.contains("response-content-type=application%2Foctet-stream"), "{}", signed.url);
}

#[tokio::test]
async fn a_presigned_url_expires_before_its_credentials() {
    let lifetime = |credentials_seconds: Option<u64>, requested: Duration| async move {
        let expires_at = credentials_seconds.map(|seconds| SystemTime::now() + Duration::from_secs(seconds));
        let key = Credentials::new("TEMP", "secret", Some("session".to_owned()), expires_at, "test");
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(aws_config::BehaviorVersion::v2026_01_12())
            .region(aws_sdk_s3::config::Region::new("us-east-1"));
        let signer = Signer::new(config, SharedCredentialsProvider::new(key));
        let signed = signer.part(&location(), "u", 1, 5, None, requested).await?;
        assert!(signed.url.contains("X-Amz-Security-Token=session"));
        assert!(signed.url.contains(&format!("X-Amz-Expires={}&", signed.expires_in.as_secs())), "{}", signed.url);
        Ok::<u64, Error>(signed.expires_in.as_secs())
    };
    assert_eq!(lifetime(None, 10 * MINUTE).await.unwrap(), 600);
    assert_eq!(lifetime(Some(3600), 10 * MINUTE).await.unwrap(), 600);
    let short = lifetime(Some(100), 10 * MINUTE).await.unwrap();
    assert!((60..=70).contains(&short), "{short}");
    assert_eq!(lifetime(None, 30 * 24 * 60 * MINUTE).await.unwrap(), MAX_URL_LIFETIME.as_secs());
    assert!(matches!(lifetime(Some(20), MINUTE).await, Err(Error::Unavailable(_))));
    assert!(matches!(lifetime(None, Duration::from_millis(900)).await, Err(Error::Unavailable(_))));
}
