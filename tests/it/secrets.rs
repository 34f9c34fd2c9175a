//! Secrets stay secret: everything that a broker writes at its most talkative is searched for every secret that it knows.

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::servers::servers;
use crate::harness::serving::Serving;
use crate::harness::uploads::PART;
use crate::harness::{Answer, House, bytes, sha256};

const SECRET: &str = "canary-of-the-tokens-0123456789abcdef";

/// A caller of the process.
struct Caller<'a> {
    house: &'a House,
    serving: &'a Serving,
    token: String,
}

impl Caller<'_> {
    async fn ask(&self, method: &str, path: &str, body: Option<Vec<u8>>) -> Answer {
        let mut request = self.house.http.request(method.parse().unwrap(), format!("{}{path}", self.serving.url()));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        self.house.send(request.bearer_auth(&self.token)).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, Some(body.to_string().into())).await
    }
}

/// What makes a presigned URL one: whoever has it may write or read.
fn signature(url: &Value) -> String {
    let url = url.as_str().expect("a URL");
    url.split("X-Amz-Signature=").nth(1).expect("a signature").split('&').next().unwrap().to_owned()
}

#[tokio::test]
async fn no_secret_is_ever_written() {
    let house = House::new().await;
    let key = servers().s3.secret_access_key.clone();
    // The database's own password may be a word that is everywhere.
    let (role, password) = (format!("r{}", Uuid::new_v4().simple()), format!("p{}", Uuid::new_v4().simple()));
    let create = format!("create role {role} superuser login password '{password}'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(create)).execute(&house.db).await.unwrap();
    let (_, address) = house.settings.store.url.split_once('@').expect("a URL with a user");
    let database_url = format!("postgres://{role}:{password}@{address}");
    let serving = house
        .serving(&[
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
    let caller = Caller { house: &house, serving: &serving, token: token.clone() };

    let (single, large) = (b"hello".to_vec(), bytes(PART + 9, 1));
    let one = json!({"topic": house.topic, "size": 5, "sha256": sha256(&single)});
    let one = caller.post("/lfs/uploads", &one).await.expect(201);
    house.put(&one.json["upload"], &single).await.expect(200);
    let done = caller.post(&format!("/lfs/uploads/{}/complete", one.id()), &json!({})).await.expect(200);
    let record = house.records(&house.topic).await.remove(0);
    let resolved = caller.ask("POST", "/lfs/resolve", Some(record.value)).await.expect(200);
    let many = json!({"topic": house.topic, "size": large.len(), "sha256": sha256(&large), "part_size": PART});
    let many = caller.post("/lfs/uploads", &many).await.expect(201);
    house.put_parts(&many.json["parts"], &large).await;
    caller.post(&format!("/lfs/uploads/{}/complete", many.id()), &json!({})).await;
    let abandoned = caller.post("/lfs/uploads", &json!({"topic": house.topic, "size": 7})).await.expect(201);
    caller.ask("DELETE", &format!("/lfs/uploads/{}", abandoned.id()), None).await.expect(204);
    caller.ask("POST", "/lfs/uploads", Some(b"{".to_vec())).await.expect(400);
    let tampered = format!("{token}x");
    let refused = house.http.get(format!("{}/lfs/uploads", serving.url())).bearer_auth(&tampered);
    house.send(refused).await.expect(401);
    for path in ["/lfs/stats", "/readyz", "/lfs/topics", "/lfs/uploads", "/lfs/nothing"] {
        let answer = caller.ask("GET", path, None).await;
        for secret in [&key, SECRET, &token] {
            assert!(!answer.text.contains(secret), "{path}: {}", answer.text);
        }
    }
    assert_eq!(done.state(), "published");
    serving.says("cleaned up after").await;

    let log = serving.log();
    assert!(log.contains("TRACE") && log.len() > 10_000, "it talks: {} bytes", log.len());
    for (what, secret) in [
        ("the S3 secret", key.as_str()),
        ("the secret of the tokens", SECRET),
        ("a token", token.as_str()),
        ("a token's signature", token.rsplit('.').next().unwrap()),
        ("a refused token", tampered.as_str()),
        ("the database's password", password.as_str()),
        ("a URL to write by", &signature(&one.json["upload"]["url"])),
        ("a URL to write a part by", &signature(&many.json["parts"][0]["url"])),
        ("a URL to read by", &signature(&resolved.json["url"])),
    ] {
        if let Some(at) = log.find(secret) {
            let line = log.lines().find(|line| line.contains(secret)).unwrap_or_default();
            panic!("{what} is written at {at}: {}", line.chars().take(600).collect::<String>());
        }
    }
}
