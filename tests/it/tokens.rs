//! Tokens: which are let in, by which keys, and what an issuer's key set may do to us.

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

use crate::harness::House;
use crate::harness::faults::refused_soon;
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

/// A key pair, and what the world knows of it.
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
        // What it is good for is its kind's, not one algorithm's.
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

/// A token whose parts are what they are, signed with the secret.
fn raw(header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &EncodingKey::from_secret(SECRET.as_bytes()), Algorithm::HS256);
    format!("{signed}.{}", signature.unwrap())
}

/// A house that knows who issues tokens, and by which keys only where `change` says so.
async fn house(change: impl FnOnce(&mut auth::Settings)) -> House {
    House::with_tokens(|settings| {
        settings.auth.hs256_secret = None;
        change(&mut settings.auth);
    })
    .await
}

async fn let_in(house: &House, token: &str) -> u16 {
    house.send(house.request("GET", "/lfs/uploads").bearer_auth(token)).await.status
}

async fn refuses(house: &House, what: &str, token: &str) {
    let answer = house.send(house.request("GET", "/lfs/uploads").bearer_auth(token)).await;
    assert_eq!((answer.status, answer.code()), (401, "invalid-token"), "{what}: {}", answer.text);
    let challenge = answer.headers["www-authenticate"].to_str().unwrap();
    assert!(challenge.starts_with("Bearer") && challenge.contains("invalid_token"), "{what}: {challenge}");
}

/// What an issuer's server does.
#[derive(Clone)]
enum Behaviour {
    Serve(Value),
    Fail,
    Hang,
    Redirect(String),
    Endless,
    Garbage,
}

/// An issuer's server, with a count of how often it was asked.
struct Issuer {
    address: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
    asked: Arc<AtomicUsize>,
}

impl Issuer {
    async fn new(behaviour: Behaviour) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let issuer = Self { address, behaviour: Arc::new(Mutex::new(behaviour)), asked: Arc::default() };
        let state = (Arc::clone(&issuer.behaviour), Arc::clone(&issuer.asked));
        let routes = axum::Router::new().fallback(answer).with_state(state);
        tokio::spawn(async move { axum::serve(listener, routes).await });
        issuer
    }

    async fn of(signers: &[&Signer]) -> Self {
        Self::new(serve(signers)).await
    }

    fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    fn becomes(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn serve(signers: &[&Signer]) -> Behaviour {
    Behaviour::Serve(json!({"keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>()}))
}

type Shared = (Arc<Mutex<Behaviour>>, Arc<AtomicUsize>);

async fn answer(State((behaviour, asked)): State<Shared>) -> axum::response::Response {
    asked.fetch_add(1, Ordering::SeqCst);
    let behaviour = behaviour.lock().unwrap().clone();
    match behaviour {
        Behaviour::Serve(set) => axum::Json(set).into_response(),
        Behaviour::Fail => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Behaviour::Hang => std::future::pending().await,
        Behaviour::Redirect(to) => (StatusCode::FOUND, [("location", to)]).into_response(),
        Behaviour::Endless => {
            let piece = || Ok::<_, std::io::Error>(axum::body::Bytes::from_static(&[b' '; 65536]));
            let pieces = futures_util::stream::iter(std::iter::repeat_with(piece));
            axum::body::Body::from_stream(pieces).into_response()
        }
        Behaviour::Garbage => "{\"keys\": 7}".into_response(),
    }
}

#[tokio::test]
async fn a_key_set_lets_in_by_its_own_algorithms_and_no_other() {
    let (rsa, p256, ed25519) = (Signer::rsa("r"), Signer::p256("e"), Signer::ed25519("o"));
    let issuer = Issuer::of(&[&rsa, &p256, &ed25519]).await;
    let house = house(|auth| auth.jwks_url = Some(issuer.url())).await;
    for signer in [&rsa, &p256, &ed25519] {
        assert_eq!(let_in(&house, &signer.token()).await, 200, "{:?}", signer.algorithm);
    }
    let with = |signer: &Signer, algorithm, kid: Option<&str>| {
        signer.sign(&Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) })
    };
    assert_eq!(let_in(&house, &with(&rsa, Algorithm::PS256, Some("r"))).await, 200);
    for algorithm in [Algorithm::RS384, Algorithm::RS512, Algorithm::PS384, Algorithm::PS512] {
        refuses(&house, &format!("{algorithm:?}"), &with(&rsa, algorithm, Some("r"))).await;
    }
    refuses(&house, "another key's kid", &with(&rsa, Algorithm::RS256, Some("e"))).await;
    refuses(&house, "no kid where there are three keys", &with(&rsa, Algorithm::RS256, None)).await;
    refuses(&house, "another key under a known kid", &Signer::rsa("r").token()).await;
    // The public key taken for a shared secret: what algorithm confusion is.
    let confused = Header { kid: Some("r".to_owned()), ..Header::new(Algorithm::HS256) };
    for secret in [rsa.public_pem.as_bytes(), rsa.jwk()["n"].as_str().unwrap().as_bytes()] {
        refuses(&house, "a public key as a secret", &encode(&confused, &claims(), &EncodingKey::from_secret(secret)).unwrap())
            .await;
    }
    for none in [r#"{"alg":"none","kid":"r"}"#, r#"{"alg":"None"}"#, r#"{"alg":"","kid":"r"}"#, r#"{"kid":"r"}"#, "7", ""] {
        let unsigned = format!("{}.{}.", URL_SAFE_NO_PAD.encode(none), URL_SAFE_NO_PAD.encode(claims().to_string()));
        refuses(&house, none, &unsigned).await;
    }
    let token = rsa.token();
    let (signed, signature) = token.rsplit_once('.').unwrap();
    refuses(&house, "no signature", &format!("{signed}.")).await;
    refuses(&house, "a signature of nothing", &format!("{}.{signature}", signed.replace('e', "f"))).await;
    refuses(&house, "five parts", &format!("{token}.a.b")).await;
}

#[tokio::test]
async fn a_public_key_lets_in_by_its_own_algorithms_and_no_other() {
    for signer in [Signer::rsa("r"), Signer::p256("e"), Signer::ed25519("o")] {
        let house = house(|auth| auth.public_key_pem = Some(signer.public_pem.clone())).await;
        assert_eq!(let_in(&house, &signer.token()).await, 200, "{:?}", signer.algorithm);
        let secret = EncodingKey::from_secret(signer.public_pem.as_bytes());
        refuses(&house, "the PEM as a secret", &encode(&Header::new(Algorithm::HS256), &claims(), &secret).unwrap()).await;
        refuses(&house, "another key", &Signer::p256("e").token()).await;
        if signer.algorithm == Algorithm::RS256 {
            assert_eq!(let_in(&house, &signer.sign(&Header::new(Algorithm::PS256))).await, 200);
            refuses(&house, "RS512", &signer.sign(&Header::new(Algorithm::RS512))).await;
        }
    }
}

#[tokio::test]
async fn every_claim_is_required_and_checked() {
    let house = house(|auth| auth.hs256_secret = Some(SECRET.into())).await;
    let sign = |claims: &Value| raw(r#"{"alg":"HS256"}"#, &claims.to_string());
    let with = |name: &str, value: Value| {
        let mut claims = claims();
        claims[name] = value;
        claims
    };
    for (name, value) in [
        ("aud", json!(["other", "it"])),
        ("nbf", json!(now() - 5)),
        // An issuer's clock may be 30 seconds ahead.
        ("nbf", json!(now() + 15)),
        ("exp", json!(now() + 15)),
        ("more", json!({"is": "not looked at"})),
    ] {
        assert_eq!(let_in(&house, &sign(&with(name, value.clone()))).await, 200, "{name}: {value}");
    }
    for name in ["sub", "tenant", "scope", "iss", "aud", "exp"] {
        let mut absent = claims();
        absent.as_object_mut().unwrap().remove(name);
        refuses(&house, &format!("{name} is absent"), &sign(&absent)).await;
        for value in [Value::Null, json!(true), json!([]), json!({})] {
            refuses(&house, &format!("{name} is {value}"), &sign(&with(name, value.clone()))).await;
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
        refuses(&house, &format!("{name} is {value}"), &sign(&with(name, value.clone()))).await;
    }
    let twice = claims().to_string().replacen('{', r#"{"tenant":"globex","#, 1);
    refuses(&house, "a tenant twice", &raw(r#"{"alg":"HS256"}"#, &twice)).await;
    refuses(&house, "no JSON", &raw(r#"{"alg":"HS256"}"#, "sub=s")).await;
    for authorization in ["", "Bearer", "Basic YTpi", "bearer"] {
        let request = house.request("GET", "/lfs/uploads").header("authorization", authorization);
        house.send(request).await.expect_problem(401, "unauthenticated");
    }
}

#[tokio::test]
async fn the_longest_subject_opens_with_the_longest_idempotency_key() {
    let house = house(|auth| auth.hs256_secret = Some(SECRET.into())).await;
    let mut claims = tokens::claims(&"t".repeat(63), "lfs:write", &["*"]);
    // Random, for PostgreSQL packs what repeats itself before it looks whether a row of an index is too large.
    let mut random = fastrand::Rng::with_seed(1);
    let mut text = |length| std::iter::repeat_with(|| random.alphanumeric()).take(length).collect::<String>();
    claims["sub"] = json!(text(1024));
    let body = json!({"topic": house.topic, "size": 1, "sha256": crate::harness::sha256(b"x")});
    let key = text(255);
    let open = async || {
        let request = house.request("POST", "/lfs/uploads").bearer_auth(tokens::sign(&claims)).header("idempotency-key", &key);
        house.send(request.json(&body)).await
    };
    let opened = open().await.expect(201);
    assert_eq!(open().await.expect(200).id(), opened.id());
}

#[tokio::test]
async fn a_header_chooses_among_our_keys_and_nothing_else() {
    let (ours, theirs) = (Signer::p256("ours"), Signer::p256("theirs"));
    let (issuer, stranger) = (Issuer::of(&[&ours]).await, Issuer::of(&[&theirs]).await);
    let house = house(|auth| auth.jwks_url = Some(issuer.url())).await;
    assert_eq!(let_in(&house, &ours.sign(&Header::new(Algorithm::ES256))).await, 200, "there is only one key to mean");
    let jwk: Jwk = serde_json::from_value(theirs.jwk()).unwrap();
    let url = Some(stranger.url());
    for header in [
        Header { jwk: Some(jwk), ..theirs.header() },
        Header { jku: url.clone(), ..theirs.header() },
        Header { x5u: url, ..theirs.header() },
        Header { kid: Some("ours".to_owned()), jku: Some(stranger.url()), ..theirs.header() },
        Header { kid: Some("../../etc/passwd".to_owned()), ..theirs.header() },
        Header { crit: Some(vec!["exp".to_owned()]), ..ours.header() },
        Header { crit: Some(Vec::new()), ..ours.header() },
    ] {
        let signer = if header.crit.is_some() { &ours } else { &theirs };
        refuses(&house, &format!("{header:?}"), &signer.sign(&header)).await;
    }
    assert_eq!(stranger.asked(), 0, "a token's own address is never asked");
}

#[tokio::test]
async fn a_key_set_is_fetched_once_however_many_ask() {
    let (first, second) = (Signer::p256("first"), Signer::p256("second"));
    let issuer = Issuer::of(&[&first]).await;
    let house = house(|auth| auth.jwks_url = Some(issuer.url())).await;
    let statuses = join_all((0..50).map(|_| async { let_in(&house, &first.token()).await })).await;
    assert_eq!((statuses, issuer.asked()), (vec![200; 50], 1));
    // A key that came since is found at once; who makes one up has nothing fetched for half a minute.
    issuer.becomes(serve(&[&first, &second]));
    assert_eq!((let_in(&house, &second.token()).await, issuer.asked()), (200, 2));
    let made_up = Signer::p256("made up");
    let refused = join_all((0..50).map(|_| async { let_in(&house, &made_up.token()).await })).await;
    assert_eq!((refused, issuer.asked()), (vec![401; 50], 2));
    // An issuer that is away costs nobody who was known.
    issuer.becomes(Behaviour::Fail);
    assert_eq!(let_in(&house, &first.token()).await, 200);
}

#[tokio::test]
async fn without_a_key_set_callers_are_told_to_come_again_and_it_recovers() {
    let signer = Signer::p256("k");
    let elsewhere = Issuer::of(&[&signer]).await;
    let oversized = json!({"keys": [signer.jwk()], "more": " ".repeat(300 << 10)});
    for behaviour in [
        Behaviour::Fail,
        Behaviour::Hang,
        Behaviour::Redirect(elsewhere.url()),
        Behaviour::Endless,
        Behaviour::Garbage,
        Behaviour::Serve(oversized),
        Behaviour::Serve(json!({"keys": [{"kty": "oct", "kid": "k", "k": URL_SAFE_NO_PAD.encode(SECRET)}]})),
    ] {
        let issuer = Issuer::new(behaviour).await;
        let house = house(|auth| auth.jwks_url = Some(issuer.url())).await;
        let ask = || house.send(house.request("GET", "/lfs/uploads").bearer_auth(signer.token()));
        refused_soon(ask(), &["dependency-unavailable"]).await;
        let begun = Instant::now();
        for answer in join_all((0..30).map(|_| ask())).await {
            assert_eq!(answer.status, 503, "{}", answer.text);
        }
        assert!(begun.elapsed() < Duration::from_secs(5) && issuer.asked() < 8, "{:?}, {}", begun.elapsed(), issuer.asked());
        issuer.becomes(serve(&[&signer]));
        house.eventually("the keys are there", || async { let_in(&house, &signer.token()).await == 200 }).await;
    }
    assert_eq!(elsewhere.asked(), 0, "a redirect is not followed");
}
