//! Creates the S3 clients from the settings: the sources of credentials and region, and the timeouts of calls.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_config::meta::region::RegionProviderChain;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Builder, Config, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedCredentialsProvider,
    StalledStreamProtectionConfig,
};

use super::presign::Signer;
use super::undeclared::BucketDefaults;
use super::{Error, Inner, Objects, call_error, error_code};

/// The object store and the credentials: the `[s3]` table.
#[derive(Clone, Default)]
pub struct Settings {
    /// The bucket of topics whose policy names no bucket.
    pub bucket: Option<String>,
    /// The endpoint that the broker calls; if absent, `AWS_ENDPOINT_URL_S3` or Amazon's endpoint.
    pub endpoint: Option<String>,
    /// The endpoint that URLs are signed for; if absent, the endpoint that the broker calls.
    pub public_endpoint: Option<String>,
    /// Whether the bucket is in the path instead of the host name; if absent, true for an endpoint that is not Amazon's.
    pub force_path_style: Option<bool>,
    /// The region; if absent, the usual AWS sources, and then `us-east-1` for an endpoint that is not Amazon's.
    pub region: Option<String>,
    /// The broker's access key; if absent, the usual AWS sources.
    pub access_key_id: Option<String>,
    /// The secret of the broker's access key.
    pub secret_access_key: Option<String>,
    /// The write-only access key that upload URLs are signed with; if absent, the broker's access key.
    pub signing_access_key_id: Option<String>,
    /// The secret of the write-only access key.
    pub signing_secret_access_key: Option<String>,
    /// Serve even if the store lets the holder of an upload URL copy any object that the signing key may read.
    pub allow_copy_source: bool,
    /// How long a call may take for which a client waits; if absent, less than two seconds. `serve` has no setting for it:
    /// tests raise it, so that a busy machine does not look like an S3 that is unreachable.
    pub call_timeout: Option<Duration>,
}

impl Settings {
    /// Checks the settings without any network call.
    ///
    /// # Errors
    /// If only half of a credential is set, or an endpoint is not a URL.
    pub fn check(&self) -> Result<(), Error> {
        credential(BROKER_KEY, &self.access_key_id, &self.secret_access_key)?;
        credential(SIGNING_KEY, &self.signing_access_key_id, &self.signing_secret_access_key)?;
        let environment = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].map(|name| (name, std::env::var(name).ok()));
        let settings = [("s3.endpoint", self.endpoint.clone()), ("LFS_BROKER_S3_PUBLIC_ENDPOINT", self.public_endpoint.clone())];
        for (name, endpoint) in environment.into_iter().chain(settings) {
            // The SDK treats an empty variable as not set.
            if endpoint.is_some_and(|endpoint| !endpoint.is_empty() && !is_endpoint(&endpoint)) {
                // The message omits the value, because the URL may contain a password.
                return Err(Error::Settings(format!("{name} must be a URL such as https://s3.example.net")));
            }
        }
        Ok(())
    }
}

fn is_endpoint(endpoint: &str) -> bool {
    let url = endpoint.parse::<reqwest::Url>();
    url.is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host() && url.query().is_none())
}

impl fmt::Debug for Settings {
    /// Shows the access key ids and omits the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("bucket", &self.bucket)
            .field("endpoint", &self.endpoint)
            .field("public_endpoint", &self.public_endpoint)
            .field("force_path_style", &self.force_path_style)
            .field("region", &self.region)
            .field("access_key_id", &self.access_key_id)
            .field("signing_access_key_id", &self.signing_access_key_id)
            .field("allow_copy_source", &self.allow_copy_source)
            .finish_non_exhaustive()
    }
}

const BROKER_KEY: [&str; 2] = ["s3.access_key_id", "s3.secret_access_key"];
const SIGNING_KEY: [&str; 2] = ["LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", "LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY"];

/// The timeouts and the number of attempts of one kind of call.
#[derive(Clone, Copy)]
pub(super) struct CallTimeouts {
    attempt: Duration,
    total: Duration,
    max_attempts: u32,
}

/// A working connection inside a data centre opens within about 1 ms, so a longer wait means that S3 is unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);
const BACKOFF: Duration = Duration::from_millis(50);

impl CallTimeouts {
    /// A client waits for these calls, so an unreachable S3 must be noticed in less than two seconds.
    const DEFAULT: Self = Self { attempt: Duration::from_millis(1200), total: Duration::from_millis(1800), max_attempts: 2 };
    /// The health check must answer before the prober's timeout, which is often two seconds.
    const HEALTH: Self = Self { attempt: Duration::from_millis(1400), total: Duration::from_millis(1400), max_attempts: 1 };
    /// S3 joins up to 10,000 parts. There is one attempt, because a second attempt would find no multipart upload.
    pub(super) const COMPLETE: Self = Self { attempt: Duration::from_secs(60), total: Duration::from_secs(60), max_attempts: 1 };
    /// Deletions and lists are slow on some stores, and no client waits for them.
    pub(super) const DELETE: Self = Self { attempt: Duration::from_secs(15), total: Duration::from_secs(30), max_attempts: 2 };
    /// The time until the first byte; [`super::ObjectReader`] limits the pauses of the stream.
    pub(super) const READ: Self = Self { attempt: Duration::from_secs(20), total: Duration::from_secs(30), max_attempts: 2 };

    fn timeout_config(self) -> TimeoutConfig {
        TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(self.attempt)
            .operation_timeout(self.total)
            .build()
    }

    fn retry_config(self) -> RetryConfig {
        RetryConfig::standard().with_max_attempts(self.max_attempts).with_initial_backoff(BACKOFF).with_max_backoff(BACKOFF)
    }
}

/// The configuration override for a call that needs other timeouts than [`CallTimeouts::DEFAULT`].
pub(super) fn timeout_override(timeouts: CallTimeouts) -> Builder {
    Config::builder().timeout_config(timeouts.timeout_config()).retry_config(timeouts.retry_config())
}

impl Objects {
    /// Creates the clients without a call to S3, so that a broker can start while S3 is unreachable.
    ///
    /// # Errors
    /// As [`Settings::check`], or if no region is configured.
    pub async fn connect(settings: &Settings) -> Result<Objects, Error> {
        settings.check()?;
        let broker_key = credential(BROKER_KEY, &settings.access_key_id, &settings.secret_access_key)?;
        let signing_key = credential(SIGNING_KEY, &settings.signing_access_key_id, &settings.signing_secret_access_key)?;
        let sdk_config = load_sdk_config(settings, broker_key).await?;
        let no_source = || Error::Settings("no source of aws credentials is configured: set s3.access_key_id".to_owned());
        let broker_key = sdk_config.credentials_provider().ok_or_else(no_source)?;
        let signing_key = signing_key.unwrap_or_else(|| broker_key.clone());

        let internal = client_config(&sdk_config, settings);
        let public = match &settings.public_endpoint {
            Some(endpoint) => internal.clone().endpoint_url(endpoint).force_path_style(settings.force_path_style.unwrap_or(true)),
            None => internal.clone(),
        };
        Ok(Objects(Arc::new(Inner {
            client: Client::from_conf(internal.clone().build()),
            upload_signer: Signer::new(public.clone(), signing_key.clone()),
            download_signer: Signer::new(public, broker_key),
            internal_upload_signer: Signer::new(internal, signing_key),
            endpoint: endpoint_in_words(settings),
            bucket: settings.bucket.clone(),
            bucket_defaults: BucketDefaults::default(),
        })))
    }

    /// Checks that S3 answers the broker.
    ///
    /// # Errors
    /// If S3 does not answer within 1.4 seconds, or denies access to the default bucket.
    pub async fn reachable(&self) -> Result<(), Error> {
        let Some(bucket) = &self.0.bucket else {
            let request = self.0.client.list_buckets().max_buckets(1);
            return match request.customize().config_override(timeout_override(CallTimeouts::HEALTH)).send().await {
                Ok(_) => Ok(()),
                // Many credentials may not list buckets, but "access denied" shows that S3 answers.
                Err(error) if error_code(&error) == "AccessDenied" => Ok(()),
                Err(error) => Err(call_error("ListBuckets", &error)),
            };
        };
        let request = self.0.client.head_bucket().bucket(bucket);
        match request.customize().config_override(timeout_override(CallTimeouts::HEALTH)).send().await {
            Ok(_) => Ok(()),
            Err(error) => Err(call_error("HeadBucket", &error)),
        }
    }
}

/// A credential from the settings; `None` if neither the id nor the secret is set.
fn credential(
    [id_name, secret_name]: [&str; 2],
    id: &Option<String>,
    secret: &Option<String>,
) -> Result<Option<SharedCredentialsProvider>, Error> {
    match (id, secret) {
        (None, None) => Ok(None),
        (Some(id), Some(secret)) => {
            let key = Credentials::new(id, secret, None, None, "lfs-broker settings");
            Ok(Some(SharedCredentialsProvider::new(key)))
        }
        _ => Err(Error::Settings(format!("{id_name} and {secret_name} must both be set, but only one of them is set"))),
    }
}

/// Whether the endpoint is not Amazon's.
fn has_custom_endpoint(settings: &Settings) -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    settings.endpoint.is_some() || is_set("AWS_ENDPOINT_URL_S3") || is_set("AWS_ENDPOINT_URL")
}

/// The endpoint that the broker calls, without a password that its URL may contain.
fn endpoint_in_words(settings: &Settings) -> String {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let configured = settings.endpoint.clone();
    let url = configured.or_else(|| variable("AWS_ENDPOINT_URL_S3")).or_else(|| variable("AWS_ENDPOINT_URL"));
    let origin = url.and_then(|url| url.parse::<reqwest::Url>().ok()).map(|url| url.origin().ascii_serialization());
    origin.unwrap_or_else(|| "Amazon's".to_owned())
}

/// Reads the environment and the AWS configuration files.
async fn load_sdk_config(settings: &Settings, key: Option<SharedCredentialsProvider>) -> Result<SdkConfig, Error> {
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
    if let Some(key) = key {
        loader = loader.credentials_provider(key);
    }
    if let Some(region) = &settings.region {
        loader = loader.region(Region::new(region.clone()));
    } else if has_custom_endpoint(settings) {
        // The instance metadata service is omitted: it needs a network call, and it knows only Amazon's region.
        loader = loader.region(
            RegionProviderChain::first_try(aws_config::environment::EnvironmentVariableRegionProvider::new())
                .or_else(aws_config::profile::ProfileFileRegionProvider::new())
                .or_else(Region::new("us-east-1")),
        );
    }
    let sdk_config = loader.load().await;
    match sdk_config.region() {
        Some(_) => Ok(sdk_config),
        None => Err(Error::Settings("no s3 region is configured: set s3.region or AWS_REGION".to_owned())),
    }
}

/// The configuration that all clients share.
fn client_config(sdk_config: &SdkConfig, settings: &Settings) -> Builder {
    let timeouts = settings.call_timeout.map_or(CallTimeouts::DEFAULT, |timeout| CallTimeouts {
        attempt: timeout,
        total: timeout,
        ..CallTimeouts::DEFAULT
    });
    let mut config = Builder::from(sdk_config)
        .force_path_style(settings.force_path_style.unwrap_or_else(|| has_custom_endpoint(settings)))
        .timeout_config(timeouts.timeout_config())
        .retry_config(timeouts.retry_config())
        // The SDK would treat a reader that pauses to hash as a stalled stream. `ObjectReader` has its own timeout.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        // The broker sets checksums itself. A checksum that the SDK adds would be signed, and the client would have to send it.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(endpoint) = &settings.endpoint {
        config = config.endpoint_url(endpoint);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debug_output_of_the_settings_contains_no_secret() {
        let settings = Settings {
            access_key_id: Some("AKID".to_owned()),
            secret_access_key: Some("hush".to_owned()),
            signing_secret_access_key: Some("hush".to_owned()),
            ..Settings::default()
        };
        let shown = format!("{settings:?}");
        assert!(shown.contains("AKID") && !shown.contains("hush"), "{shown}");
    }

    #[tokio::test]
    async fn an_access_key_id_without_its_secret_is_an_error() {
        let settings = Settings { access_key_id: Some("AKID".to_owned()), ..Settings::default() };
        assert!(matches!(Objects::connect(&settings).await, Err(Error::Settings(_))));
    }

    #[tokio::test]
    async fn an_unreachable_store_is_noticed_in_less_than_two_seconds() {
        // The listener never accepts: the connection opens, and no answer arrives.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = Settings {
            bucket: Some("b".to_owned()),
            endpoint: Some(format!("http://{}", silent.local_addr().unwrap())),
            access_key_id: Some("AKID".to_owned()),
            secret_access_key: Some("secret".to_owned()),
            ..Settings::default()
        };
        let objects = Objects::connect(&settings).await.unwrap();
        let location = super::super::ObjectLocation { bucket: "b".to_owned(), key: "k".to_owned() };
        // The fastest of five runs: the machine may be busy. Two attempts without a common limit take 2.4 s each time.
        let mut fastest = Duration::MAX;
        for _ in 0..5 {
            let started = std::time::Instant::now();
            let (reachable, head) = tokio::join!(objects.reachable(), objects.head(&location, None));
            assert!(matches!(reachable, Err(Error::Unavailable(_))), "{reachable:?}");
            assert!(matches!(head, Err(Error::Unavailable(_))), "{head:?}");
            fastest = fastest.min(started.elapsed());
            if fastest < Duration::from_secs(2) {
                break;
            }
        }
        assert!(fastest < Duration::from_secs(2), "{fastest:?}");
    }
}
