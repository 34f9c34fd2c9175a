//! A JSON Web Key Set behind a URL (RFC 7517). It is cached, kept while the URL does not answer, and rate-limited: requests
//! with made-up tokens cannot cause a fetch each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jsonwebtoken::Algorithm;
use jsonwebtoken::jwk::Jwk;
use tracing::{info, warn};

use super::keys::{RequiredClaims, VerificationKey};
use super::{BadSettings, Error};
use crate::telemetry::error_chain;

/// How often the key set is fetched, and how long it is used.
#[derive(Clone, Copy)]
struct RefreshIntervals {
    /// The set is fetched again after this time, in the background. Callers use the old set meanwhile.
    refresh_after: Duration,
    /// If fetching fails, the set is used for this long. A withdrawn key must not stay valid without an end.
    expire_after: Duration,
    /// An unknown `kid` causes a fetch at most this often, because anyone can make up a `kid`.
    unknown_kid: Duration,
    /// The shortest time between two fetches. Without it, each caller would cause a fetch while there is no set.
    retry: Duration,
}

const INTERVALS: RefreshIntervals = RefreshIntervals {
    refresh_after: Duration::from_secs(300),
    expire_after: Duration::from_secs(24 * 3600),
    unknown_kid: Duration::from_secs(30),
    retry: Duration::from_secs(1),
};

/// The time limit of one fetch, from the DNS query to the last byte.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller waits for a fetch, so that the caller gets a response within two seconds.
const WAIT_TIMEOUT: Duration = Duration::from_millis(1700);
/// The largest key set, in bytes. One key has about 1,000.
const MAX_SET_BYTES: usize = 256 << 10;

/// The keys of an issuer.
pub(crate) struct Jwks {
    url: String,
    client: reqwest::Client,
    required: RequiredClaims,
    intervals: RefreshIntervals,
    cached: Mutex<Cached>,
    /// Held during a fetch, so that there is only one at a time.
    fetch_lock: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Cached {
    set: Option<(Arc<KeySet>, Instant)>,
    /// The end of the last fetch, successful or not.
    last_fetch_at: Option<Instant>,
    /// The last fetch because of an unknown `kid`.
    last_unknown_kid_at: Option<Instant>,
}

/// The usable keys by `kid`. Keys without a `kid` have the empty string.
struct KeySet(HashMap<String, Vec<Arc<VerificationKey>>>);

impl KeySet {
    fn parse(document: &[u8], required: &RequiredClaims) -> Result<Self, serde_json::Error> {
        #[derive(serde::Deserialize)]
        struct Document {
            keys: Vec<serde_json::Value>,
        }
        let document: Document = serde_json::from_slice(document)?;
        let mut keys: HashMap<String, Vec<Arc<VerificationKey>>> = HashMap::new();
        // An unsupported key must not make the other keys unusable.
        for jwk in document.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok()) {
            if let Some(key) = VerificationKey::from_jwk(&jwk, required) {
                keys.entry(jwk.common.key_id.unwrap_or_default()).or_default().push(Arc::new(key));
            }
        }
        Ok(Self(keys))
    }

    fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// The key with this `kid`. A token without a `kid` is accepted only if the set has exactly one key.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Arc<VerificationKey>> {
        let named = match kid {
            Some(kid) => self.0.get(kid)?,
            None if self.len() == 1 => self.0.values().next()?,
            None => return None,
        };
        named.iter().find(|key| key.supports(algorithm)).cloned()
    }
}

impl Jwks {
    pub(super) fn new(url: &str, required: RequiredClaims) -> Result<Self, BadSettings> {
        let parsed = reqwest::Url::parse(url).map_err(|_| BadSettings::InsecureUrl)?;
        let host = parsed.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let local = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if parsed.scheme() != "https" && !(parsed.scheme() == "http" && local) {
            return Err(BadSettings::InsecureUrl);
        }
        // A redirect could lead to another party's key set.
        let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).timeout(FETCH_TIMEOUT);
        let client = client.build().map_err(BadSettings::Client)?;
        let (cached, fetch_lock) = (Mutex::default(), tokio::sync::Mutex::default());
        Ok(Self { url: url.to_owned(), client, required, intervals: INTERVALS, cached, fetch_lock })
    }

    pub(super) fn refresh_in_background(self: &Arc<Self>) {
        let jwks = Arc::clone(self);
        tokio::spawn(async move { jwks.refresh(jwks.intervals.retry).await });
    }

    /// The key for a token with this header.
    pub(super) async fn key(self: &Arc<Self>, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<VerificationKey>, Error> {
        let set = match self.set_younger_than(self.intervals.expire_after) {
            Some(set) => set,
            None => {
                self.wait_for_refresh(self.intervals.retry).await;
                self.set_younger_than(self.intervals.expire_after).ok_or(Error::Unavailable)?
            }
        };
        if self.set_younger_than(self.intervals.refresh_after).is_none() {
            self.refresh_in_background();
        }
        if let Some(key) = set.find(kid, algorithm) {
            return Ok(key);
        }
        if self.may_fetch_for_unknown_kid() {
            self.wait_for_refresh(Duration::ZERO).await;
        }
        let set = self.set_younger_than(self.intervals.expire_after).ok_or(Error::Unavailable)?;
        set.find(kid, algorithm).ok_or(Error::Invalid("the token is signed with a key that this broker does not know"))
    }

    fn cached(&self) -> std::sync::MutexGuard<'_, Cached> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_younger_than(&self, age: Duration) -> Option<Arc<KeySet>> {
        self.cached().set.as_ref().filter(|(_, at)| at.elapsed() < age).map(|(set, _)| Arc::clone(set))
    }

    /// Whether an unknown `kid` may cause a fetch now. If so, records the fetch.
    fn may_fetch_for_unknown_kid(&self) -> bool {
        let mut cached = self.cached();
        let allowed = cached.last_unknown_kid_at.is_none_or(|at| at.elapsed() >= self.intervals.unknown_kid);
        if allowed {
            cached.last_unknown_kid_at = Some(Instant::now());
        }
        allowed
    }

    /// Waits for this or a running fetch, at most [`WAIT_TIMEOUT`]. After the timeout the fetch continues in the background.
    async fn wait_for_refresh(self: &Arc<Self>, at_most_every: Duration) {
        let jwks = Arc::clone(self);
        let refresh = tokio::spawn(async move { jwks.refresh(at_most_every).await });
        let _ = tokio::time::timeout(WAIT_TIMEOUT, refresh).await;
    }

    /// Fetches the set, unless the last fetch was less than `at_most_every` ago.
    async fn refresh(&self, at_most_every: Duration) {
        let requested_at = Instant::now();
        let _guard = self.fetch_lock.lock().await;
        let last_fetch_at = self.cached().last_fetch_at;
        // A fetch that ended while this one waited for the lock counts too.
        if last_fetch_at.is_some_and(|at| at >= requested_at || at.elapsed() < at_most_every) {
            return;
        }
        let fetched = self.fetch().await;
        let now = Instant::now();
        let mut cached = self.cached();
        cached.last_fetch_at = Some(now);
        match fetched {
            Ok(set) => {
                info!(url = self.url, keys = set.len(), "fetched {} token keys", set.len());
                cached.set = Some((Arc::new(set), now));
            }
            Err(error) => warn!(url = self.url, error, "could not fetch the token keys: {error}; retrying on a later request"),
        }
    }

    async fn fetch(&self) -> Result<KeySet, String> {
        // The reason of a failed connection, such as an untrusted certificate, is in the error's causes.
        let describe = |error: reqwest::Error| error_chain(&error.without_url());
        let mut response = self.client.get(&self.url).header("accept", "application/json").send().await.map_err(describe)?;
        if response.status().as_u16() != 200 {
            return Err(format!("the server answered {}", response.status()));
        }
        let mut document = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(describe)? {
            document.extend_from_slice(&chunk);
            if document.len() > MAX_SET_BYTES {
                return Err(format!("the key set has more than {MAX_SET_BYTES} bytes"));
            }
        }
        let set = KeySet::parse(&document, &self.required)
            .map_err(|error| format!("the response is not a JSON Web Key Set: {error}"))?;
        if set.len() == 0 { Err("the key set has no usable key".to_owned()) } else { Ok(set) }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::watch;

    use super::*;

    /// The key of RFC 8037, appendix A.2.
    const KEY_SET_JSON: &str =
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    /// An issuer that answers 200 while `healthy`, else 500. Returns its URL and the number of its requests.
    async fn issuer(healthy: watch::Receiver<bool>) -> (String, watch::Receiver<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks", listener.local_addr().unwrap());
        let (requests, count) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 4096]).await;
                let status = if *healthy.borrow() { "200 OK" } else { "500 Oh" };
                requests.send_modify(|count| *count += 1);
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{KEY_SET_JSON}",
                    KEY_SET_JSON.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        (url, count)
    }

    fn jwks(url: &str, intervals: RefreshIntervals) -> Arc<Jwks> {
        let required = RequiredClaims { issuer: "i".to_owned(), audience: "a".to_owned() };
        Arc::new(Jwks { intervals, ..Jwks::new(url, required).unwrap() })
    }

    async fn wait_for_fetches(count: &mut watch::Receiver<usize>, wanted: usize) {
        let reached = count.wait_for(|count| *count >= wanted);
        tokio::time::timeout(Duration::from_secs(10), reached).await.expect("the set is fetched in time").unwrap();
    }

    #[tokio::test]
    async fn an_old_key_set_is_used_while_fetching_fails_and_then_expires() {
        let (set_healthy, healthy) = watch::channel(true);
        let (url, mut count) = issuer(healthy).await;
        let (refresh_after, expire_after) = (Duration::ZERO, Duration::from_millis(1500));
        let jwks = jwks(&url, RefreshIntervals { refresh_after, expire_after, retry: Duration::ZERO, ..INTERVALS });
        let begun = Instant::now();
        assert!(jwks.key(Some("a"), Algorithm::EdDSA).await.is_ok());
        set_healthy.send(false).unwrap();
        let before = *count.borrow();
        // The set is fetched again in the background, without success.
        assert!(jwks.key(Some("a"), Algorithm::EdDSA).await.is_ok() || begun.elapsed() > expire_after);
        wait_for_fetches(&mut count, before + 1).await;
        while begun.elapsed() < expire_after + Duration::from_millis(500) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(matches!(jwks.key(Some("a"), Algorithm::EdDSA).await, Err(Error::Unavailable)));
        set_healthy.send(true).unwrap();
        let mut found = jwks.key(Some("a"), Algorithm::EdDSA).await;
        for _ in 0..50 {
            if found.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            found = jwks.key(Some("a"), Algorithm::EdDSA).await;
        }
        assert!(found.is_ok(), "keys are available again without a restart");
    }

    #[tokio::test]
    async fn made_up_kids_cause_at_most_one_fetch_per_interval() {
        let (_set_healthy, healthy) = watch::channel(true);
        let (url, count) = issuer(healthy).await;
        let jwks = jwks(&url, RefreshIntervals { unknown_kid: Duration::from_millis(400), ..INTERVALS });
        let made_up = async || {
            for number in 0..20 {
                let kid = format!("made up {number}");
                assert!(matches!(jwks.key(Some(&kid), Algorithm::EdDSA).await, Err(Error::Invalid(_))));
            }
        };
        let begun = Instant::now();
        made_up().await;
        // One fetch because there was no set, one for the first unknown kid.
        assert!(*count.borrow() == 2 || begun.elapsed() > jwks.intervals.unknown_kid);
        let before = *count.borrow();
        tokio::time::sleep(jwks.intervals.unknown_kid).await;
        made_up().await;
        assert!(*count.borrow() > before);
    }

    #[tokio::test]
    async fn an_untrusted_certificate_is_named_in_the_error() {
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
        let error = jwks(&url, INTERVALS).fetch().await.err().expect("the certificate is not trusted");
        assert!(error.contains("certificate") && !error.contains("localhost:"), "{error}");
    }

    #[test]
    fn only_signing_keys_are_accepted() {
        let required = RequiredClaims { issuer: "i".to_owned(), audience: "a".to_owned() };
        let count = |keys: &str| KeySet::parse(format!(r#"{{"keys":[{keys}]}}"#).as_bytes(), &required).map(|set| set.len()).ok();
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let ed = |more: &str| format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}"{more}}}"#);
        assert_eq!(count(&ed("")), Some(1));
        assert_eq!(count(&ed(r#","use":"sig","alg":"EdDSA","key_ops":["verify"]"#)), Some(1));
        for not in [r#","use":"enc""#, r#","key_ops":["sign"]"#, r#","alg":"ES256""#] {
            assert_eq!(count(&ed(not)), Some(0), "{not}");
        }
        // A shared secret in a public set is not secret, and a short modulus can be factored.
        assert_eq!(count(r#"{"kty":"oct","k":"c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}"#), Some(0));
        assert_eq!(count(&format!(r#"{{"kty":"RSA","e":"AQAB","n":"{}"}}"#, "A".repeat(171))), Some(0));
        assert_eq!(count(&format!(r#"{{"kty":"what"}},{},7"#, ed(""))), Some(1), "the other keys are still used");
        assert_eq!(KeySet::parse(b"{}", &required).map(|set| set.len()).ok(), None);
    }

    #[test]
    fn key_set_urls_must_be_https_or_loopback() {
        let required = RequiredClaims { issuer: "i".to_owned(), audience: "a".to_owned() };
        for url in ["https://a.example/jwks", "http://127.0.0.1:1/jwks", "http://[::1]/jwks", "http://localhost/jwks"] {
            assert!(Jwks::new(url, required.clone()).is_ok(), "{url}");
        }
        for url in ["http://a.example/jwks", "http://10.0.0.1/jwks", "ftp://localhost/", "", "jwks", "file:///etc/passwd"] {
            assert!(Jwks::new(url, required.clone()).is_err(), "{url}");
        }
    }
}
