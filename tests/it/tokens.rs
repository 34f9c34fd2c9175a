//! Tokens: which ones are accepted, with which keys, and how the broker handles an issuer's key set.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use lfs_broker::auth;
use serde_json::{Value, json};

use crate::harness::TestBroker;
use crate::harness::faults::expect_quick_refusal;
use crate::harness::tokens::{self, SECRET};

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

fn claims() -> Value {
    tokens::claims("acme", "lfs:read lfs:write", &["*"])
}

fn pem(label: &str, der: &[u8]) -> String {
    let lines: Vec<String> =
        STANDARD.encode(der).as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// A key pair, with the public key as PEM.
struct Signer {
    kid: &'static str,
    private: EncodingKey,
    algorithm: Algorithm,
    public_pem: String,
}

impl Signer {
    fn rsa(kid: &'static str) -> Self {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let private = pem("PRIVATE KEY", AsDer::<Pkcs8V1Der>::as_der(&pair).unwrap().as_ref());
        let public = AsDer::<PublicKeyX509Der>::as_der(pair.public_key()).unwrap();
        let private = EncodingKey::from_rsa_pem(private.as_bytes()).unwrap();
        Self { kid, private, algorithm: Algorithm::RS256, public_pem: pem("PUBLIC KEY", public.as_ref()) }
    }

    fn p256(kid: &'static str) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let private = EncodingKey::from_ec_der(pair.to_pkcs8v1().unwrap().as_ref());
        let public = AsDer::<PublicKeyX509Der>::as_der(pair.public_key()).unwrap();
        Self { kid, private, algorithm: Algorithm::ES256, public_pem: pem("PUBLIC KEY", public.as_ref()) }
    }

    fn ed25519(kid: &'static str) -> Self {
        let pair = Ed25519KeyPair::generate().unwrap();
        let private = EncodingKey::from_ed_der(pair.to_pkcs8v1().unwrap().as_ref());
        let public = AsDer::<PublicKeyX509Der>::as_der(pair.public_key()).unwrap();
        Self { kid, private, algorithm: Algorithm::EdDSA, public_pem: pem("PUBLIC KEY", public.as_ref()) }
    }

    fn jwk(&self) -> Value {
        let mut jwk = Jwk::from_encoding_key(&self.private, self.algorithm).unwrap();
        jwk.common.key_id = Some(self.kid.to_owned());
        // Without an algorithm in the JWK, every algorithm of the key's type is possible.
        jwk.common.key_algorithm = None;
        serde_json::to_value(jwk).unwrap()
    }

    fn header(&self) -> Header {
        Header { kid: Some(self.kid.to_owned()), ..Header::new(self.algorithm) }
    }

    fn sign(&self, header: &Header) -> String {
        encode(header, &claims(), &self.private).unwrap()
    }

    fn token(&self) -> String {
        self.sign(&self.header())
    }
}

/// A token with this header and these claims as text, signed with the secret.
fn signed_token(header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &EncodingKey::from_secret(SECRET.as_bytes()), Algorithm::HS256);
    format!("{signed}.{}", signature.unwrap())
}

/// A test broker that knows the issuer. `change` sets the keys.
async fn start_broker(change: impl FnOnce(&mut auth::Settings)) -> TestBroker {
    TestBroker::start_with_tokens(|settings| {
        settings.auth.hs256_secret = None;
        change(&mut settings.auth);
    })
    .await
}

async fn status_with(broker: &TestBroker, token: &str) -> u16 {
    broker.send(broker.request("GET", "/lfs/uploads").bearer_auth(token)).await.status
}

async fn assert_refused(broker: &TestBroker, case: &str, token: &str) {
    let response = broker.send(broker.request("GET", "/lfs/uploads").bearer_auth(token)).await;
    assert_eq!((response.status, response.code()), (401, "invalid-token"), "{case}: {}", response.text);
    let challenge = response.headers["www-authenticate"].to_str().unwrap();
    assert!(challenge.starts_with("Bearer") && challenge.contains("invalid_token"), "{case}: {challenge}");
}

/// How an issuer's server answers.
#[derive(Clone)]
enum Behaviour {
    Serve(Value),
    Fail,
    Hang,
    Redirect(String),
    Endless,
    Garbage,
}

/// An issuer's server that counts its requests.
struct Issuer {
    address: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
    requests: Arc<AtomicUsize>,
}

impl Issuer {
    async fn new(behaviour: Behaviour) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let issuer = Self { address, behaviour: Arc::new(Mutex::new(behaviour)), requests: Arc::default() };
        let state = (Arc::clone(&issuer.behaviour), Arc::clone(&issuer.requests));
        let routes = axum::Router::new().fallback(serve_keys).with_state(state);
        tokio::spawn(async move { axum::serve(listener, routes).await });
        issuer
    }

    async fn of(signers: &[&Signer]) -> Self {
        Self::new(serves(signers)).await
    }

    fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    fn set_behaviour(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn serves(signers: &[&Signer]) -> Behaviour {
    Behaviour::Serve(json!({"keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>()}))
}

type Shared = (Arc<Mutex<Behaviour>>, Arc<AtomicUsize>);

async fn serve_keys(State((behaviour, requests)): State<Shared>) -> axum::response::Response {
    requests.fetch_add(1, Ordering::SeqCst);
    let behaviour = behaviour.lock().unwrap().clone();
    match behaviour {
        Behaviour::Serve(set) => axum::Json(set).into_response(),
        Behaviour::Fail => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Behaviour::Hang => std::future::pending().await,
        Behaviour::Redirect(to) => (StatusCode::FOUND, [("location", to)]).into_response(),
        Behaviour::Endless => {
            let chunk = || Ok::<_, std::io::Error>(axum::body::Bytes::from_static(&[b' '; 65536]));
            let chunks = futures_util::stream::iter(std::iter::repeat_with(chunk));
            axum::body::Body::from_stream(chunks).into_response()
        }
        Behaviour::Garbage => "{\"keys\": 7}".into_response(),
    }
}

#[tokio::test]
async fn a_key_set_accepts_only_its_own_algorithms() {
    let (rsa, p256, ed25519) = (Signer::rsa("r"), Signer::p256("e"), Signer::ed25519("o"));
    let issuer = Issuer::of(&[&rsa, &p256, &ed25519]).await;
    let broker = start_broker(|auth| auth.jwks_url = Some(issuer.url())).await;
    for signer in [&rsa, &p256, &ed25519] {
        assert_eq!(status_with(&broker, &signer.token()).await, 200, "{:?}", signer.algorithm);
    }
    let with = |signer: &Signer, algorithm, kid: Option<&str>| {
        signer.sign(&Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) })
    };
    assert_eq!(status_with(&broker, &with(&rsa, Algorithm::PS256, Some("r"))).await, 200);
    for algorithm in [Algorithm::RS384, Algorithm::RS512, Algorithm::PS384, Algorithm::PS512] {
        assert_refused(&broker, &format!("{algorithm:?}"), &with(&rsa, algorithm, Some("r"))).await;
    }
    assert_refused(&broker, "another key's kid", &with(&rsa, Algorithm::RS256, Some("e"))).await;
    assert_refused(&broker, "no kid where there are three keys", &with(&rsa, Algorithm::RS256, None)).await;
    assert_refused(&broker, "another key under a known kid", &Signer::rsa("r").token()).await;
    // An algorithm confusion attack: the public key is used as an HMAC secret.
    let confused = Header { kid: Some("r".to_owned()), ..Header::new(Algorithm::HS256) };
    for secret in [rsa.public_pem.as_bytes(), rsa.jwk()["n"].as_str().unwrap().as_bytes()] {
        assert_refused(
            &broker,
            "a public key as a secret",
            &encode(&confused, &claims(), &EncodingKey::from_secret(secret)).unwrap(),
        )
        .await;
    }
    for none in [r#"{"alg":"none","kid":"r"}"#, r#"{"alg":"None"}"#, r#"{"alg":"","kid":"r"}"#, r#"{"kid":"r"}"#, "7", ""] {
        let unsigned = format!("{}.{}.", URL_SAFE_NO_PAD.encode(none), URL_SAFE_NO_PAD.encode(claims().to_string()));
        assert_refused(&broker, none, &unsigned).await;
    }
    let token = rsa.token();
    let (signed, signature) = token.rsplit_once('.').unwrap();
    assert_refused(&broker, "no signature", &format!("{signed}.")).await;
    assert_refused(&broker, "a signature of nothing", &format!("{}.{signature}", signed.replace('e', "f"))).await;
    assert_refused(&broker, "five parts", &format!("{token}.a.b")).await;
}

#[tokio::test]
async fn a_public_key_accepts_only_its_own_algorithms() {
    for signer in [Signer::rsa("r"), Signer::p256("e"), Signer::ed25519("o")] {
        let broker = start_broker(|auth| auth.public_key_pem = Some(signer.public_pem.clone())).await;
        assert_eq!(status_with(&broker, &signer.token()).await, 200, "{:?}", signer.algorithm);
        let secret = EncodingKey::from_secret(signer.public_pem.as_bytes());
        assert_refused(&broker, "the PEM as a secret", &encode(&Header::new(Algorithm::HS256), &claims(), &secret).unwrap())
            .await;
        assert_refused(&broker, "another key", &Signer::p256("e").token()).await;
        if signer.algorithm == Algorithm::RS256 {
            assert_eq!(status_with(&broker, &signer.sign(&Header::new(Algorithm::PS256))).await, 200);
            assert_refused(&broker, "RS512", &signer.sign(&Header::new(Algorithm::RS512))).await;
        }
    }
}

#[tokio::test]
async fn every_claim_is_required_and_checked() {
    let broker = start_broker(|auth| auth.hs256_secret = Some(SECRET.into())).await;
    let sign = |claims: &Value| signed_token(r#"{"alg":"HS256"}"#, &claims.to_string());
    let with = |name: &str, value: Value| {
        let mut claims = claims();
        claims[name] = value;
        claims
    };
    for (name, value) in [
        ("aud", json!(["other", "it"])),
        ("nbf", json!(now() - 5)),
        // An issuer's clock may be up to 30 seconds ahead.
        ("nbf", json!(now() + 15)),
        ("exp", json!(now() + 15)),
        ("more", json!({"is": "not looked at"})),
    ] {
        assert_eq!(status_with(&broker, &sign(&with(name, value.clone()))).await, 200, "{name}: {value}");
    }
    for name in ["sub", "tenant", "scope", "iss", "aud", "exp"] {
        let mut absent = claims();
        absent.as_object_mut().unwrap().remove(name);
        assert_refused(&broker, &format!("{name} is absent"), &sign(&absent)).await;
        for value in [Value::Null, json!(true), json!([]), json!({})] {
            assert_refused(&broker, &format!("{name} is {value}"), &sign(&with(name, value.clone()))).await;
        }
    }
    for (name, value) in [
        ("iss", json!("other")),
        ("aud", json!("other")),
        ("aud", json!(["other"])),
        ("exp", json!(now())),
        ("exp", json!(0)),
        ("exp", json!(-1)),
        ("exp", json!("4000000000")),
        ("nbf", json!(now() + 60)),
        ("sub", json!("")),
        ("sub", json!("a\u{0}b")),
        ("sub", json!("a\nb")),
        ("sub", json!("s".repeat(1025))),
        ("topics", json!(["a", "b\u{0}"])),
        ("topics", json!(["\u{1b}[2J*"])),
        ("topics", json!("*")),
        ("topics", json!([7])),
        ("tenant", json!("")),
        ("tenant", json!("Acme")),
        ("tenant", json!("a/b")),
        ("tenant", json!("..")),
        ("tenant", json!("a".repeat(64))),
    ] {
        assert_refused(&broker, &format!("{name} is {value}"), &sign(&with(name, value.clone()))).await;
    }
    let two_tenants = claims().to_string().replacen('{', r#"{"tenant":"globex","#, 1);
    assert_refused(&broker, "a tenant twice", &signed_token(r#"{"alg":"HS256"}"#, &two_tenants)).await;
    assert_refused(&broker, "no JSON", &signed_token(r#"{"alg":"HS256"}"#, "sub=s")).await;
    for authorization in ["", "Bearer", "Basic YTpi", "bearer"] {
        let request = broker.request("GET", "/lfs/uploads").header("authorization", authorization);
        broker.send(request).await.expect_problem(401, "unauthenticated");
    }
}

#[tokio::test]
async fn the_longest_subject_can_open_with_the_longest_idempotency_key() {
    let broker = start_broker(|auth| auth.hs256_secret = Some(SECRET.into())).await;
    let mut claims = tokens::claims(&"t".repeat(63), "lfs:write", &["*"]);
    // Random text, because PostgreSQL compresses repeated text before it checks the size of an index row.
    let mut random = fastrand::Rng::with_seed(1);
    let mut text = |length| std::iter::repeat_with(|| random.alphanumeric()).take(length).collect::<String>();
    claims["sub"] = json!(text(1024));
    let body = json!({"topic": broker.topic, "size": 1, "sha256": crate::harness::sha256(b"x")});
    let key = text(255);
    let open = async || {
        let request = broker.request("POST", "/lfs/uploads").bearer_auth(tokens::sign(&claims)).header("idempotency-key", &key);
        broker.send(request.json(&body)).await
    };
    let opened = open().await.expect(201);
    assert_eq!(open().await.expect(200).id(), opened.id());
}

#[tokio::test]
async fn a_token_header_can_only_select_one_of_the_brokers_keys() {
    let (ours, theirs) = (Signer::p256("ours"), Signer::p256("theirs"));
    let (issuer, other_issuer) = (Issuer::of(&[&ours]).await, Issuer::of(&[&theirs]).await);
    let broker = start_broker(|auth| auth.jwks_url = Some(issuer.url())).await;
    assert_eq!(status_with(&broker, &ours.sign(&Header::new(Algorithm::ES256))).await, 200, "without a kid the only key is used");
    let jwk: Jwk = serde_json::from_value(theirs.jwk()).unwrap();
    let url = Some(other_issuer.url());
    for header in [
        Header { jwk: Some(jwk), ..theirs.header() },
        Header { jku: url.clone(), ..theirs.header() },
        Header { x5u: url, ..theirs.header() },
        Header { kid: Some("ours".to_owned()), jku: Some(other_issuer.url()), ..theirs.header() },
        Header { kid: Some("../../etc/passwd".to_owned()), ..theirs.header() },
        Header { crit: Some(vec!["exp".to_owned()]), ..ours.header() },
        Header { crit: Some(Vec::new()), ..ours.header() },
    ] {
        let signer = if header.crit.is_some() { &ours } else { &theirs };
        assert_refused(&broker, &format!("{header:?}"), &signer.sign(&header)).await;
    }
    assert_eq!(other_issuer.requests(), 0, "an address in a token is never called");
}

#[tokio::test]
async fn a_key_set_is_fetched_once_for_many_requests() {
    let (first, second) = (Signer::p256("first"), Signer::p256("second"));
    let issuer = Issuer::of(&[&first]).await;
    let broker = start_broker(|auth| auth.jwks_url = Some(issuer.url())).await;
    let statuses = join_all((0..50).map(|_| async { status_with(&broker, &first.token()).await })).await;
    assert_eq!((statuses, issuer.requests()), (vec![200; 50], 1));
    // A new key is fetched at once. An unknown key id triggers no further fetch for half a minute.
    issuer.set_behaviour(serves(&[&first, &second]));
    assert_eq!((status_with(&broker, &second.token()).await, issuer.requests()), (200, 2));
    let unknown = Signer::p256("made up");
    let refused = join_all((0..50).map(|_| async { status_with(&broker, &unknown.token()).await })).await;
    assert_eq!((refused, issuer.requests()), (vec![401; 50], 2));
    // While the issuer is away, known keys stay valid.
    issuer.set_behaviour(Behaviour::Fail);
    assert_eq!(status_with(&broker, &first.token()).await, 200);
}

#[tokio::test]
async fn without_a_key_set_requests_get_503_until_it_can_be_fetched() {
    let signer = Signer::p256("k");
    let redirect_target = Issuer::of(&[&signer]).await;
    let oversized = json!({"keys": [signer.jwk()], "more": " ".repeat(300 << 10)});
    for behaviour in [
        Behaviour::Fail,
        Behaviour::Hang,
        Behaviour::Redirect(redirect_target.url()),
        Behaviour::Endless,
        Behaviour::Garbage,
        Behaviour::Serve(oversized),
        Behaviour::Serve(json!({"keys": [{"kty": "oct", "kid": "k", "k": URL_SAFE_NO_PAD.encode(SECRET)}]})),
    ] {
        let issuer = Issuer::new(behaviour).await;
        let broker = start_broker(|auth| auth.jwks_url = Some(issuer.url())).await;
        let list = || broker.send(broker.request("GET", "/lfs/uploads").bearer_auth(signer.token()));
        expect_quick_refusal(async || list().await, &["dependency-unavailable"]).await;
        let begun = Instant::now();
        for response in join_all((0..30).map(|_| list())).await {
            assert_eq!(response.status, 503, "{}", response.text);
        }
        // If each request fetched the keys after the one before it, there would be more than 30 fetches, and those from an
        // issuer that hangs would take 30 times the timeout of 1.7 s.
        let (elapsed, fetches) = (begun.elapsed(), issuer.requests());
        assert!(elapsed < Duration::from_secs(25) && fetches < 25, "{elapsed:?}, {fetches} fetches");
        issuer.set_behaviour(serves(&[&signer]));
        broker.eventually("the keys are fetched", || async { status_with(&broker, &signer.token()).await == 200 }).await;
    }
    assert_eq!(redirect_target.requests(), 0, "a redirect is not followed");
}
