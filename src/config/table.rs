//! The table of all settings. Each setting is defined once: its names, valid values, field and documentation.

use super::setting::Kind::{self, Address, Bucket, Flag, KafkaAddresses, List, Number, Secret, Text, Words};
use super::setting::{Setting, row};
use crate::{broker, http, policy, session};

/// The largest number of things, and of seconds. It only excludes typing errors.
const MAX: u64 = 1_000_000_000;
const COUNT: Kind = Number(0..=MAX, "");
const AT_LEAST_ONE: Kind = Number(1..=MAX, "");
const SECONDS: Kind = Number(1..=MAX, "seconds");
const SECONDS_OR_ZERO: Kind = Number(0..=MAX, "seconds");
/// The largest value of a quota: the largest number that its column holds. Some operators set it to mean that there is no limit.
const MAX_QUOTA: u64 = i64::MAX.unsigned_abs();
/// How long a session or a URL may live.
const LIFETIME: Kind = Number(1..=policy::MAX_LIFETIME_SECONDS, "seconds");

/// Variables of the command line, which are no settings of the broker. A test compares them with the command line.
pub(super) const CLI_VARIABLES: [(&str, &str); 4] = [
    ("LFS_BROKER_CONFIG", "The TOML file with settings, as `--config`."),
    ("LFS_BROKER_LOG_FORMAT", "`json` writes each log line as JSON. `RUST_LOG` filters the lines."),
    ("LFS_BROKER_TOKEN", "The bearer token of `put`, `get` and the other client commands, as `--token`."),
    ("LFS_BROKER_URL", "The URL of the broker for the client commands, as `--broker`."),
];

/// Variables that the AWS SDK reads itself. Their keys in the file are read here.
pub(super) const SDK_VARIABLES: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];

/// Every setting, by topic.
pub(super) static TOPICS: [(&str, &[Setting]); 9] = [
    ("Addresses", &ADDRESSES),
    ("PostgreSQL", &POSTGRESQL),
    ("Kafka", &KAFKA),
    ("S3", &S3),
    ("Tokens", &TOKENS),
    ("Uploads", &UPLOADS),
    ("Completion and cleanup", &COMPLETION),
    ("Limits", &LIMITS),
    ("Timeouts and shutdown", &TIMEOUTS),
];

/// Every setting.
pub(super) fn settings() -> impl Iterator<Item = &'static Setting> {
    TOPICS.iter().flat_map(|(_, settings)| settings.iter())
}

/// The error text for a name that is not in `names`: it shows the nearest known name.
pub(super) fn unknown(name: &str, names: impl Iterator<Item = &'static str>) -> String {
    // All names have the same prefix, so it is left out of the comparison.
    let rest = |name: &str| name.trim_start_matches("LFS_BROKER_").to_owned();
    // A short name has all its letters in some long name, so at most half of the letters may differ too.
    let near = names.filter(|known| strsim::normalized_levenshtein(&rest(name), &rest(known)) >= 0.5);
    let similar = near.map(|known| (strsim::jaro_winkler(&rest(name), &rest(known)), known));
    match similar.filter(|(similarity, _)| *similarity > 0.7).max_by(|(a, _), (b, _)| a.total_cmp(b)) {
        Some((_, known)) => format!("there is no setting {name}; did you mean {known}?"),
        None => format!("there is no setting {name}"),
    }
}

static ADDRESSES: [Setting; 6] = [
    row("LFS_BROKER_LISTEN", "listen", Address, |s| &mut s.app.listen)
        .doc("The address of the API. The default is reachable from this machine only."),
    row("LFS_BROKER_PUBLIC_URL", "public_url", Text, |s| &mut s.app.public_url).doc(
        "The base of the `Location` header, such as `https://lfs.example.net`. Its path is also the base of links in responses. \
         Without it, `Location` is a path only.",
    ),
    row("LFS_BROKER_TLS_CERTIFICATE_FILE", "tls.certificate_file", Text, |s| &mut s.raw.certificate_file).doc(
        "A PEM file: the server's certificate first, then the intermediate certificates. It is read again when it changes. \
         Without it and the key, the API is plain HTTP.",
    ),
    row("LFS_BROKER_TLS_KEY_FILE", "tls.key_file", Text, |s| &mut s.raw.key_file)
        .doc("A PEM file with the key of the certificate. Both files are set together."),
    row("LFS_BROKER_TRUSTED_PROXIES", "trusted_proxies", List, |s| &mut s.raw.trusted_proxies).doc(
        "IP addresses and networks of proxies. Only their `X-Forwarded-For` header counts. Their connections have \
         no limit per address.",
    ),
    row("LFS_BROKER_CORS_ORIGINS", "cors.origins", List, |s| &mut s.app.cors_origins)
        .doc("Web origins whose pages may call the API, such as `https://app.example.net`. `*` allows every page."),
];

static POSTGRESQL: [Setting; 2] = [
    row("DATABASE_URL", "database_url", Secret, |s| &mut s.app.store.url)
        .unset("required")
        .doc("PostgreSQL, such as `postgres://USER:PASSWORD@HOST:5432/DATABASE`."),
    row("LFS_BROKER_TENANT_CONNECTIONS", "tenant.connections", COUNT, |s| &mut s.app.store.tenant_connections).doc(
        "How many of a replica's 20 PostgreSQL connections the opens, completes and lists of one tenant may use at once; \
         further ones wait. 0: no limit. A quarter is enough for one tenant, because its writes wait for the tenant's row anyway. The rest stays free for others.",
    ),
];

static KAFKA: [Setting; 2] = [
    row("KAFKA_BOOTSTRAP_SERVERS", "kafka.bootstrap_servers", KafkaAddresses, |s| &mut s.app.kafka.bootstrap_servers)
        .unset("required")
        .doc("`HOST:PORT` of one or more Kafka brokers, separated by commas."),
    row("LFS_BROKER_DELIVERY", "delivery", Words(&["exactly_once", "at_least_once"]), |s| &mut s.app.kafka.delivery).doc(
        "Whether a pointer may be published twice. `exactly_once` needs a Kafka with transactions, and consumers with \
         `isolation.level=read_committed`.",
    ),
];

static S3: [Setting; 10] = [
    row("AWS_REGION", "s3.region", Text, |s| &mut s.app.objects.region)
        .unset("as in every AWS program, else `us-east-1` with an endpoint that is not Amazon's")
        .doc("The region of the buckets."),
    row("AWS_ENDPOINT_URL_S3", "s3.endpoint", Text, |s| &mut s.app.objects.endpoint)
        .unset("Amazon's endpoint")
        .doc("The S3 endpoint that the broker calls. The variable is read by the AWS SDK."),
    row("AWS_ACCESS_KEY_ID", "s3.access_key_id", Text, |s| &mut s.app.objects.access_key_id)
        .unset("as in every AWS program")
        .doc("The broker's access key. The variable is read by the AWS SDK, with all other sources of credentials."),
    row("AWS_SECRET_ACCESS_KEY", "s3.secret_access_key", Secret, |s| &mut s.app.objects.secret_access_key)
        .unset("as in every AWS program")
        .doc("The secret of the broker's access key. The variable is read by the AWS SDK."),
    row("LFS_BROKER_S3_BUCKET", "s3.bucket", Bucket, |s| &mut s.app.objects.bucket)
        .doc("The bucket of topics whose policy names no bucket."),
    row("LFS_BROKER_S3_PUBLIC_ENDPOINT", "s3.public_endpoint", Text, |s| &mut s.app.objects.public_endpoint)
        .unset("the endpoint that the broker calls")
        .doc(
            "The endpoint that URLs are signed for. Clients must reach it, and a proxy in front of it must keep the `Host` \
            header.",
        ),
    row("LFS_BROKER_S3_FORCE_PATH_STYLE", "s3.force_path_style", Flag, |s| &mut s.app.objects.force_path_style)
        .unset("`true` with an endpoint that is not Amazon's")
        .doc("Whether the bucket stands in the path of a URL instead of the host name."),
    row("LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", "s3.signing_access_key_id", Text, |s| &mut s.app.objects.signing_access_key_id)
        .unset("the broker's access key")
        .doc("A write-only access key that signs upload URLs. A leaked upload URL can then read nothing."),
    row("LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY", "s3.signing_secret_access_key", Secret, |s| {
        &mut s.app.objects.signing_secret_access_key
    })
    .doc("The secret of the write-only access key. Both are set together."),
    row("LFS_BROKER_S3_ALLOW_COPY_SOURCE", "s3.allow_copy_source", Flag, |s| &mut s.app.objects.allow_copy_source).doc(
        "Whether `serve` with tokens starts although the store accepts an unsigned `x-amz-copy-source` and no write-only access \
         key is set. The holder of an upload URL can then copy every object that the broker may read.",
    ),
];

static TOKENS: [Setting; 6] = [
    row("LFS_BROKER_AUTH_MODE", "auth.mode", Words(&["jwt", "none"]), |s| &mut s.app.auth.mode).doc(
        "`none` allows everything without a token. It needs a loopback address in `LFS_BROKER_LISTEN`, and requests under \
         another name than `localhost`, a loopback address or the host of `LFS_BROKER_PUBLIC_URL` get 403 `host-forbidden`.",
    ),
    row("LFS_BROKER_JWT_HS256_SECRET", "jwt.hs256_secret", Secret, |s| &mut s.app.auth.hs256_secret).doc(
        "The secret of HS256 tokens, 32 bytes or more. With `jwt`, exactly one of the secret, the public key and the JWKS URL \
         is set.",
    ),
    row("LFS_BROKER_JWT_PUBLIC_KEY_FILE", "jwt.public_key_file", Text, |s| &mut s.raw.public_key_file)
        .doc("A PEM file with the public key of tokens: RSA, P-256 or Ed25519."),
    row("LFS_BROKER_JWT_JWKS_URL", "jwt.jwks_url", Text, |s| &mut s.app.auth.jwks_url)
        .doc("The URL of the key set of tokens. It begins with `https://` or names a loopback address."),
    row("LFS_BROKER_JWT_ISSUER", "jwt.issuer", Text, |s| &mut s.app.auth.issuer)
        .unset("required with `jwt`")
        .doc("The `iss` that a token must have."),
    row("LFS_BROKER_JWT_AUDIENCE", "jwt.audience", Text, |s| &mut s.app.auth.audience)
        .unset("required with `jwt`")
        .doc("The `aud` that a token must have."),
];

static UPLOADS: [Setting; 6] = [
    row("LFS_BROKER_TOPICS_DEFAULT_ENABLED", "topics.default_enabled", Flag, |s| &mut s.app.policy.default_enabled)
        .doc("Whether a topic without a policy accepts uploads."),
    row("LFS_BROKER_SINGLE_PUT_MAX_BYTES", "single_put_max_bytes", Number(0..=session::MAX_PUT_BYTES, "bytes"), |s| {
        &mut s.app.policy.single_put_max_bytes
    })
    .doc("Larger uploads are multipart uploads. S3 accepts at most 5 GiB in one PUT."),
    row(
        "LFS_BROKER_PART_SIZE_BYTES",
        "part_size_bytes",
        Number(session::MIN_PART_BYTES..=session::MAX_PART_BYTES, "bytes"),
        |s| &mut s.app.policy.part_size_bytes,
    )
    .doc(
        "The size of a part. A file that would have more than 10,000 parts gets larger parts. S3 accepts parts of 5 MiB to 5 \
         GiB.",
    ),
    row("LFS_BROKER_SESSION_SECONDS", "session_seconds", LIFETIME, |s| &mut s.app.policy.session_seconds)
        .doc("How long an upload stays open; then it is `expired`. Signing parts extends this time."),
    row("LFS_BROKER_SESSION_MAX_SECONDS", "session_max_seconds", LIFETIME, |s| &mut s.app.policy.session_max_seconds)
        .doc("How long an upload stays open at most, however many parts are signed."),
    row("LFS_BROKER_URL_SECONDS", "url_seconds", LIFETIME, |s| &mut s.app.policy.url_seconds)
        .doc("How long a signed URL is valid. A week is the limit of S3."),
];

static COMPLETION: [Setting; 5] = [
    row("LFS_BROKER_COMPLETE_WAIT_SECONDS", "complete_wait_seconds", SECONDS_OR_ZERO, |s| &mut s.app.broker.complete_wait)
        .doc("How long complete waits for Kafka. It answers 202 at most one second later."),
    row("LFS_BROKER_CONCURRENT_COMPLETES", "concurrent_completes", AT_LEAST_ONE, |s| &mut s.app.broker.max_concurrent_completes)
        .doc(
            "How many uploads one replica completes at once, one tenant half of them. Others wait 1 s, then get 503 with \
            `Retry-After`.",
        ),
    row("LFS_BROKER_LEASE_SECONDS", "lease_seconds", Number(3..=MAX, "seconds"), |s| &mut s.app.completion.lease).doc(
        "How long a completion belongs to a replica that is silent. Then another replica continues. A lease is renewed after a \
         third of its time.",
    ),
    row("LFS_BROKER_SWEEP_SECONDS", "sweep_seconds", SECONDS, |s| &mut s.app.sweeper.interval)
        .doc("The time between two passes that expire uploads and delete what failed uploads left in S3."),
    row("LFS_BROKER_LONGEST_PUT_SECONDS", "longest_put_seconds", SECONDS_OR_ZERO, |s| &mut s.app.sweeper.max_put_duration)
        .doc("How long a PUT may take that begins before its URL expires. The cleanup of a failed upload waits for it."),
];

static LIMITS: [Setting; 8] = [
    row("LFS_BROKER_TENANT_OPEN_SESSIONS", "tenant.open_sessions", Number(0..=MAX_QUOTA, ""), |s| {
        &mut s.app.broker.quota.open_sessions
    })
    .doc("How many open uploads one tenant may have; then open gets 429 `quota-sessions-exceeded`. 0: no limit."),
    row("LFS_BROKER_TENANT_RESERVED_BYTES", "tenant.reserved_bytes", Number(0..=MAX_QUOTA, "bytes"), |s| {
        &mut s.app.broker.quota.reserved_bytes
    })
    .doc(
        "The declared bytes of one tenant's open uploads; then open gets 429 `quota-bytes-exceeded`. Single PUTs that were \
         aborted or rejected count until their URLs end, up to twice this limit. 0: no limit.",
    ),
    row("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "tenant.requests_per_second", COUNT, |s| {
        &mut s.app.http.tenant_requests_per_second
    })
    .doc("Requests of one tenant to one replica; then 429 `rate-limited`. 0: no limit. Without tokens there is no limit."),
    row("LFS_BROKER_TENANT_LONG_POLLS", "tenant.long_polls", COUNT, |s| &mut s.raw.tenant_long_polls)
        .unset("a quarter of `LFS_BROKER_CONNECTIONS`")
        .doc(
            "How many reads of one tenant may wait at once (`?wait=`) on one replica; then 429. Each occupies a connection \
            for up to 30 s. 0: no limit.",
        ),
    row("LFS_BROKER_FAILED_LOGINS_PER_MINUTE", "failed_logins_per_minute", COUNT, |s| &mut s.app.http.failed_logins_per_minute)
        .doc(
            "Invalid tokens from one address (an IPv6 /64) to one replica; then 429. 0: no limit. Without tokens there is no \
            limit.",
        ),
    row("LFS_BROKER_CONNECTIONS", "connections", AT_LEAST_ONE, |s| &mut s.app.http.connections).doc(
        "How many connections one replica serves at once; fewer where the hard limit of open files is lower. Idle connections \
         are closed for new ones. A request on a further connection waits 1 s, then gets 503 with `Retry-After`. `/healthz` and \
         `/readyz` are always answered.",
    ),
    row("LFS_BROKER_CONNECTIONS_PER_ADDRESS", "connections_per_address", COUNT, |s| &mut s.raw.connections_per_address)
        .unset("half of `LFS_BROKER_CONNECTIONS`")
        .doc("Connections of one address (an IPv6 /64); then 429. Enough for an office behind one address. 0: no limit."),
    row("LFS_BROKER_BODY_MEMORY_BYTES", "body_memory_bytes", Number(http::BODY_MEMORY, "bytes"), |s| {
        &mut s.app.http.body_memory_bytes
    })
    .doc(
        "Memory of all request bodies together, beyond the first 8 KiB of each. Others wait up to `LFS_BROKER_BODY_SECONDS`, \
         then get 503 with `Retry-After`. The default is enough for 64 bodies with 1 MiB of part hashes.",
    ),
];

static TIMEOUTS: [Setting; 6] = [
    row("LFS_BROKER_HEADER_SECONDS", "header_seconds", SECONDS, |s| &mut s.app.http.header_timeout)
        .doc("How long the head of a request may take; then 408. A TLS handshake has as much time."),
    row("LFS_BROKER_BODY_SECONDS", "body_seconds", SECONDS, |s| &mut s.app.http.body_timeout)
        .doc("How long the body of a request may take; then 408. 64 KiB take 10 s at 50 kbit/s."),
    row("LFS_BROKER_REQUEST_SECONDS", "request_seconds", Number(broker::MAX_WAIT_SECONDS + 1..=MAX, "seconds"), |s| {
        &mut s.app.http.request_timeout
    })
    .doc(
        "How long a whole request may take; then 503. More than the longest wait of a read, 30 s, and than \
         `LFS_BROKER_COMPLETE_WAIT_SECONDS`.",
    ),
    row("LFS_BROKER_IDLE_SECONDS", "idle_seconds", SECONDS, |s| &mut s.app.http.idle_timeout).doc(
        "How long a connection may wait for its next request. More than the timeout of a proxy in front of the broker, which is \
         often 60 s: the broker must not close a connection that the proxy still uses.",
    ),
    row("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "shutdown_delay_seconds", SECONDS_OR_ZERO, |s| &mut s.app.http.shutdown_delay).doc(
        "How long the broker still serves after SIGTERM, while `/readyz` answers 503. Load balancers need this time to notice.",
    ),
    row("LFS_BROKER_SHUTDOWN_GRACE_SECONDS", "shutdown_grace_seconds", SECONDS_OR_ZERO, |s| &mut s.app.http.shutdown_grace).doc(
        "How long running requests may take after the delay. Both together stay below 30 s, after which Kubernetes kills the \
         process. A second signal stops the broker at once.",
    ),
];
