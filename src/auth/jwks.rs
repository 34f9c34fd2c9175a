//! A set of keys behind a URL (RFC 7517): fetched rarely, kept while it cannot be fetched, and never at a stranger's pace.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jsonwebtoken::Algorithm;
use jsonwebtoken::jwk::Jwk;
use tracing::{info, warn};

use super::keys::{Key, Rules};
use super::{BadSettings, Error};
use crate::telemetry::chain;

/// How often a set is fetched, and how long it is good.
#[derive(Clone, Copy)]
struct Pace {
    /// A set is fetched again after so long, aside: callers go on with the old one.
    fresh: Duration,
    /// While it cannot be fetched a set is good for so long: a key that was withdrawn for a reason must end some day.
    stale: Duration,
    /// A `kid` that is not in the set has it fetched again, but not more often than this: anyone can make up a `kid`.
    unknown: Duration,
    /// Without any set every caller would fetch it.
    retry: Duration,
}

const PACE: Pace = Pace {
    fresh: Duration::from_secs(300),
    stale: Duration::from_secs(24 * 3600),
    unknown: Duration::from_secs(30),
    retry: Duration::from_secs(1),
};

/// One fetch, from the name's look-up to the last byte.
const FETCH: Duration = Duration::from_secs(5);
/// A caller hears within two seconds.
const PATIENCE: Duration = Duration::from_millis(1700);
/// The largest set, in bytes: a key has about a thousand.
const SET_BYTES: usize = 256 << 10;

/// The keys of an issuer.
pub(crate) struct Jwks {
    url: String,
    client: reqwest::Client,
    rules: Rules,
    pace: Pace,
    cached: Mutex<Cached>,
    /// One fetch at a time, however many wait for it.
    flight: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Cached {
    set: Option<(Arc<Set>, Instant)>,
    /// The end of the last fetch, whatever came of it.
    tried_at: Option<Instant>,
    /// The last fetch for a `kid` that was not known.
    asked_at: Option<Instant>,
}

/// The usable keys by `kid`; those without one have the empty name.
struct Set(HashMap<String, Vec<Arc<Key>>>);

impl Set {
    fn of(document: &[u8], rules: &Rules) -> Result<Self, serde_json::Error> {
        #[derive(serde::Deserialize)]
        struct Document {
            keys: Vec<serde_json::Value>,
        }
        let document: Document = serde_json::from_slice(document)?;
        let mut keys: HashMap<String, Vec<Arc<Key>>> = HashMap::new();
        // A key of a kind that is not known yet must not cost us the others.
        for jwk in document.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok()) {
            if let Some(key) = Key::of_jwk(&jwk, rules) {
                keys.entry(jwk.common.key_id.unwrap_or_default()).or_default().push(Arc::new(key));
            }
        }
        Ok(Self(keys))
    }

    fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// The key of this name. A token without a `kid` can only mean the only key that there is.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Arc<Key>> {
        let named = match kid {
            Some(kid) => self.0.get(kid)?,
            None if self.len() == 1 => self.0.values().next()?,
            None => return None,
        };
        named.iter().find(|key| key.is_for(algorithm)).cloned()
    }
}

impl Jwks {
    pub(super) fn new(url: &str, rules: Rules) -> Result<Self, BadSettings> {
        let parsed = reqwest::Url::parse(url).map_err(|_| BadSettings::PlainUrl)?;
        let host = parsed.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let local = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if parsed.scheme() != "https" && !(parsed.scheme() == "http" && local) {
            return Err(BadSettings::PlainUrl);
        }
        // A redirect could lead to a set of somebody else's.
        let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).timeout(FETCH);
        let client = client.build().map_err(BadSettings::Client)?;
        let (cached, flight) = (Mutex::default(), tokio::sync::Mutex::default());
        Ok(Self { url: url.to_owned(), client, rules, pace: PACE, cached, flight })
    }

    pub(super) fn warm(self: &Arc<Self>) {
        let jwks = Arc::clone(self);
        tokio::spawn(async move { jwks.refresh(jwks.pace.retry).await });
    }

    /// The key for a token that says this of itself.
    pub(super) async fn key(self: &Arc<Self>, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<Key>, Error> {
        let set = match self.set(self.pace.stale) {
            Some(set) => set,
            None => {
                self.refreshed(self.pace.retry).await;
                self.set(self.pace.stale).ok_or(Error::Unavailable)?
            }
        };
        if self.set(self.pace.fresh).is_none() {
            self.warm();
        }
        if let Some(key) = set.find(kid, algorithm) {
            return Ok(key);
        }
        if self.may_ask() {
            self.refreshed(Duration::ZERO).await;
        }
        let set = self.set(self.pace.stale).ok_or(Error::Unavailable)?;
        set.find(kid, algorithm).ok_or(Error::Invalid("the token is signed with a key that is not known here"))
    }

    fn cached(&self) -> std::sync::MutexGuard<'_, Cached> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The set, if it is younger than this.
    fn set(&self, age: Duration) -> Option<Arc<Set>> {
        self.cached().set.as_ref().filter(|(_, at)| at.elapsed() < age).map(|(set, _)| Arc::clone(set))
    }

    /// Whether a `kid` that is not known may have the set fetched: the first in a while may.
    fn may_ask(&self) -> bool {
        let mut cached = self.cached();
        let may = cached.asked_at.is_none_or(|at| at.elapsed() >= self.pace.unknown);
        if may {
            cached.asked_at = Some(Instant::now());
        }
        may
    }

    /// Waits for a fetch, ours or another's, but not longer than a caller does. The fetch goes on without them.
    async fn refreshed(self: &Arc<Self>, at_most_every: Duration) {
        let jwks = Arc::clone(self);
        let flight = tokio::spawn(async move { jwks.refresh(at_most_every).await });
        let _ = tokio::time::timeout(PATIENCE, flight).await;
    }

    /// Fetches the set, unless that was tried a moment ago.
    async fn refresh(&self, at_most_every: Duration) {
        let asked_at = Instant::now();
        let _only = self.flight.lock().await;
        let tried_at = self.cached().tried_at;
        // Also what was tried while this one waited for its turn.
        if tried_at.is_some_and(|at| at >= asked_at || at.elapsed() < at_most_every) {
            return;
        }
        let fetched = self.fetch().await;
        let now = Instant::now();
        let mut cached = self.cached();
        cached.tried_at = Some(now);
        match fetched {
            Ok(set) => {
                info!(url = self.url, keys = set.len(), "fetched the keys of tokens");
                cached.set = Some((Arc::new(set), now));
            }
            Err(error) => warn!(url = self.url, error, "could not fetch the keys of tokens: {error}"),
        }
    }

    async fn fetch(&self) -> Result<Set, String> {
        // Why there is no connection, such as a certificate that is not trusted, stands in the causes.
        let words = |error: reqwest::Error| chain(&error.without_url());
        let mut answer = self.client.get(&self.url).header("accept", "application/json").send().await.map_err(words)?;
        if answer.status().as_u16() != 200 {
            return Err(format!("answered {}", answer.status()));
        }
        let mut document = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(words)? {
            document.extend_from_slice(&piece);
            if document.len() > SET_BYTES {
                return Err(format!("the set has more than {SET_BYTES} bytes"));
            }
        }
        let set = Set::of(&document, &self.rules).map_err(|error| format!("not a set of keys: {error}"))?;
        if set.len() == 0 { Err("the set has no key that can be used here".to_owned()) } else { Ok(set) }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::watch;

    use super::*;

    /// The key of RFC 8037, appendix A.2.
    const SET: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    /// An issuer that answers 200 while `well`, else 500; and how often it was asked.
    async fn issuer(well: watch::Receiver<bool>) -> (String, watch::Receiver<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks", listener.local_addr().unwrap());
        let (asked, count) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 4096]).await;
                let status = if *well.borrow() { "200 OK" } else { "500 Oh" };
                asked.send_modify(|asked| *asked += 1);
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{SET}", SET.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        (url, count)
    }

    fn jwks(url: &str, pace: Pace) -> Arc<Jwks> {
        let rules = Rules { issuer: "i".to_owned(), audience: "a".to_owned() };
        Arc::new(Jwks { pace, ..Jwks::new(url, rules).unwrap() })
    }

    async fn until(count: &mut watch::Receiver<usize>, wanted: usize) {
        let reached = count.wait_for(|count| *count >= wanted);
        tokio::time::timeout(Duration::from_secs(10), reached).await.expect("it is fetched in time").unwrap();
    }

    #[tokio::test]
    async fn an_old_set_is_good_while_it_cannot_be_fetched_and_ends_some_day() {
        let (well, is_well) = watch::channel(true);
        let (url, mut count) = issuer(is_well).await;
        let (fresh, stale) = (Duration::ZERO, Duration::from_millis(1500));
        let jwks = jwks(&url, Pace { fresh, stale, retry: Duration::ZERO, ..PACE });
        let begun = Instant::now();
        assert!(jwks.key(Some("a"), Algorithm::EdDSA).await.is_ok());
        well.send(false).unwrap();
        let asked = *count.borrow();
        // It is fetched again aside, in vain.
        assert!(jwks.key(Some("a"), Algorithm::EdDSA).await.is_ok() || begun.elapsed() > stale);
        until(&mut count, asked + 1).await;
        while begun.elapsed() < stale + Duration::from_millis(500) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(matches!(jwks.key(Some("a"), Algorithm::EdDSA).await, Err(Error::Unavailable)));
        well.send(true).unwrap();
        let mut found = jwks.key(Some("a"), Algorithm::EdDSA).await;
        for _ in 0..50 {
            if found.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            found = jwks.key(Some("a"), Algorithm::EdDSA).await;
        }
        assert!(found.is_ok(), "it recovers by itself");
    }

    #[tokio::test]
    async fn a_made_up_kid_has_the_set_fetched_once_in_a_while() {
        let (_well, is_well) = watch::channel(true);
        let (url, count) = issuer(is_well).await;
        let jwks = jwks(&url, Pace { unknown: Duration::from_millis(400), ..PACE });
        let made_up = async || {
            for number in 0..20 {
                let kid = format!("made up {number}");
                assert!(matches!(jwks.key(Some(&kid), Algorithm::EdDSA).await, Err(Error::Invalid(_))));
            }
        };
        let begun = Instant::now();
        made_up().await;
        // One fetch because there was no set, one for the first kid that is not in it.
        assert!(*count.borrow() == 2 || begun.elapsed() > jwks.pace.unknown);
        let before = *count.borrow();
        tokio::time::sleep(jwks.pace.unknown).await;
        made_up().await;
        assert!(*count.borrow() > before);
    }

    #[tokio::test]
    async fn a_certificate_that_is_not_trusted_is_named() {
        let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let server = server.with_no_client_auth().with_single_cert(vec![pair.cert.der().clone()], key).unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}/jwks", listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = acceptor.accept(stream).await;
            }
        });
        let told = jwks(&url, PACE).fetch().await.err().expect("nobody vouches for it");
        assert!(told.contains("certificate") && !told.contains("localhost:"), "{told}");
    }

    #[test]
    fn only_keys_that_sign_are_taken() {
        let rules = Rules { issuer: "i".to_owned(), audience: "a".to_owned() };
        let count = |keys: &str| Set::of(format!(r#"{{"keys":[{keys}]}}"#).as_bytes(), &rules).map(|set| set.len()).ok();
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let ed = |more: &str| format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}"{more}}}"#);
        assert_eq!(count(&ed("")), Some(1));
        assert_eq!(count(&ed(r#","use":"sig","alg":"EdDSA","key_ops":["verify"]"#)), Some(1));
        for not in [r#","use":"enc""#, r#","key_ops":["sign"]"#, r#","alg":"ES256""#] {
            assert_eq!(count(&ed(not)), Some(0), "{not}");
        }
        // A shared secret in a public set is nobody's secret; a short modulus can be factored.
        assert_eq!(count(r#"{"kty":"oct","k":"c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}"#), Some(0));
        assert_eq!(count(&format!(r#"{{"kty":"RSA","e":"AQAB","n":"{}"}}"#, "A".repeat(171))), Some(0));
        assert_eq!(count(&format!(r#"{{"kty":"what"}},{},7"#, ed(""))), Some(1), "the others count");
        assert_eq!(Set::of(b"{}", &rules).map(|set| set.len()).ok(), None);
    }

    #[test]
    fn keys_come_by_a_safe_way_only() {
        let rules = Rules { issuer: "i".to_owned(), audience: "a".to_owned() };
        for url in ["https://a.example/jwks", "http://127.0.0.1:1/jwks", "http://[::1]/jwks", "http://localhost/jwks"] {
            assert!(Jwks::new(url, rules.clone()).is_ok(), "{url}");
        }
        for url in ["http://a.example/jwks", "http://10.0.0.1/jwks", "ftp://localhost/", "", "jwks", "file:///etc/passwd"] {
            assert!(Jwks::new(url, rules.clone()).is_err(), "{url}");
        }
    }
}
