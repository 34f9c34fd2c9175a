//! Secrets: the log of a broker at level TRACE is searched for every secret that the broker knows.

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::process::BrokerProcess;
use crate::harness::servers::servers;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, TestBroker, bytes, sha256};

const SECRET: &str = "canary-of-the-tokens-0123456789abcdef";

/// A client of the process, with a token.
struct Caller<'a> {
    broker: &'a TestBroker,
    process: &'a BrokerProcess,
    token: String,
}

impl Caller<'_> {
    async fn request(&self, method: &str, path: &str, body: Option<Vec<u8>>) -> ApiResponse {
        let mut builder = self.broker.http.request(method.parse().unwrap(), format!("{}{path}", self.process.url()));
        if let Some(body) = body {
            builder = builder.header("content-type", "application/json").body(body);
        }
        self.broker.send(builder.bearer_auth(&self.token)).await
    }

    async fn post(&self, path: &str, body: &Value) -> ApiResponse {
        self.request("POST", path, Some(body.to_string().into())).await
    }
}

/// The signature of a presigned URL: it grants access to the object.
fn signature(url: &Value) -> String {
    let url = url.as_str().expect("a URL");
    url.split("X-Amz-Signature=").nth(1).expect("a signature").split('&').next().unwrap().to_owned()
}

#[tokio::test]
async fn no_secret_is_ever_logged() {
    let mut broker = TestBroker::start().await;
    // Otherwise its sweeper could do the cleanup that the process must log.
    broker.stop().await;
    let key = servers().s3.secret_access_key.clone();
    // The default database password may be an ordinary word, so the test uses a random one.
    let (role, password) = (format!("r{}", Uuid::new_v4().simple()), format!("p{}", Uuid::new_v4().simple()));
    let create = format!("create role {role} superuser login password '{password}'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(create)).execute(&broker.db).await.unwrap();
    let (_, address) = broker.settings.store.url.split_once('@').expect("a URL with a user");
    let database_url = format!("postgres://{role}:{password}@{address}");
    let process = broker
        .spawn_process(&[
            ("RUST_LOG", "trace"),
            ("DATABASE_URL", &database_url),
            ("LFS_BROKER_AUTH_MODE", "jwt"),
            ("LFS_BROKER_JWT_HS256_SECRET", SECRET),
            ("LFS_BROKER_JWT_ISSUER", "it"),
            ("LFS_BROKER_JWT_AUDIENCE", "it"),
            ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", "true"),
        ])
        .await;
    let claims = json!({"sub": "s", "tenant": "acme", "scope": "lfs:write lfs:read lfs:admin", "topics": ["*"], "iss": "it",
        "aud": "it", "exp": 4_000_000_000u64});
    let token = encode(&Header::default(), &claims, &EncodingKey::from_secret(SECRET.as_bytes())).unwrap();
    let caller = Caller { broker: &broker, process: &process, token: token.clone() };

    let (single, large) = (b"hello".to_vec(), bytes(PART_BYTES + 9, 1));
    let one = json!({"topic": broker.topic, "size": 5, "sha256": sha256(&single)});
    let one = caller.post("/lfs/uploads", &one).await.expect(201);
    broker.put(&one.json["upload"], &single).await.expect(200);
    let done = caller.post(&format!("/lfs/uploads/{}/complete", one.id()), &json!({})).await.expect(200);
    let record = broker.records(&broker.topic).await.remove(0);
    let resolved = caller.request("POST", "/lfs/resolve", Some(record.value)).await.expect(200);
    let many = json!({"topic": broker.topic, "size": large.len(), "sha256": sha256(&large), "part_size": PART_BYTES});
    let many = caller.post("/lfs/uploads", &many).await.expect(201);
    broker.put_parts(&many.json["parts"], &large).await;
    caller.post(&format!("/lfs/uploads/{}/complete", many.id()), &json!({})).await;
    let abandoned = caller.post("/lfs/uploads", &json!({"topic": broker.topic, "size": 7})).await.expect(201);
    caller.request("DELETE", &format!("/lfs/uploads/{}", abandoned.id()), None).await.expect(204);
    caller.request("POST", "/lfs/uploads", Some(b"{".to_vec())).await.expect(400);
    let tampered = format!("{token}x");
    let refused = broker.http.get(format!("{}/lfs/uploads", process.url())).bearer_auth(&tampered);
    broker.send(refused).await.expect(401);
    for path in ["/lfs/stats", "/readyz", "/lfs/topics", "/lfs/uploads", "/lfs/nothing"] {
        let response = caller.request("GET", path, None).await;
        for secret in [&key, SECRET, &token] {
            assert!(!response.text.contains(secret), "{path}: {}", response.text);
        }
    }
    assert_eq!(done.state(), "published");
    process.wait_for_log("cleaned up after").await;

    let log = process.log();
    assert!(log.contains("TRACE") && log.len() > 10_000, "the log is at level TRACE: {} bytes", log.len());
    for (description, secret) in [
        ("the S3 secret", key.as_str()),
        ("the secret of the tokens", SECRET),
        ("a token", token.as_str()),
        ("a token's signature", token.rsplit('.').next().unwrap()),
        ("a refused token", tampered.as_str()),
        ("the database's password", password.as_str()),
        ("a URL for a PUT", &signature(&one.json["upload"]["url"])),
        ("a URL for a part", &signature(&many.json["parts"][0]["url"])),
        ("a URL for a GET", &signature(&resolved.json["url"])),
    ] {
        if let Some(at) = log.find(secret) {
            let line = log.lines().find(|line| line.contains(secret)).unwrap_or_default();
            panic!("{description} is written at {at}: {}", line.chars().take(600).collect::<String>());
        }
    }
}
