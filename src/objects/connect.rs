//! From settings to clients: where credentials and region come from, and how long a call may take.

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
use serde::Deserialize;

use super::sign::Signer;
use super::undeclared::Defaults;
use super::{Error, Inner, Objects, code, failed};

/// Where the objects are and who signs: the `[s3]` table.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The bucket of topics that name none.
    pub bucket: Option<String>,
    /// The endpoint that the broker talks to; `AWS_ENDPOINT_URL_S3` or Amazon's own when absent.
    pub endpoint: Option<String>,
    /// The endpoint that URLs are signed for; the broker's own when absent.
    pub public_endpoint: Option<String>,
    /// Whether the bucket is in the path instead of the host name; true for an endpoint that is not Amazon's.
    pub force_path_style: Option<bool>,
    /// The region; the usual AWS sources when absent, and `us-east-1` for an endpoint that is not Amazon's.
    pub region: Option<String>,
    /// The broker's access key; the usual AWS sources when absent.
    pub access_key_id: Option<String>,
    /// Its secret.
    pub secret_access_key: Option<String>,
    /// The access key that uploads are signed with: one that may only write. The broker's own when absent.
    pub signing_access_key_id: Option<String>,
    /// Its secret.
    pub signing_secret_access_key: Option<String>,
    /// Serve even where the store lets the holder of an upload URL copy what the signer may read.
    pub allow_copy_source: bool,
}

impl Settings {
    /// Checks what can be checked without asking anybody.
    ///
    /// # Errors
    /// Where half a credential is given, or an endpoint is no URL.
    pub fn check(&self) -> Result<(), Error> {
        pair(OWN_KEY, &self.access_key_id, &self.secret_access_key)?;
        pair(SIGNING_KEY, &self.signing_access_key_id, &self.signing_secret_access_key)?;
        let own = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].map(|name| (name, std::env::var(name).ok()));
        let told = [("s3.endpoint", self.endpoint.clone()), ("LFS_BROKER_S3_PUBLIC_ENDPOINT", self.public_endpoint.clone())];
        for (name, endpoint) in own.into_iter().chain(told) {
            // Set to nothing, the SDK takes a variable for not set.
            if endpoint.is_some_and(|endpoint| !endpoint.is_empty() && !is_endpoint(&endpoint)) {
                // Its value is not shown: it may hold a password.
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
    /// Names the keys and hides their secrets.
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

const OWN_KEY: [&str; 2] = ["s3.access_key_id", "s3.secret_access_key"];
const SIGNING_KEY: [&str; 2] = ["LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", "LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY"];

/// How long one kind of call may take.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    attempt: Duration,
    total: Duration,
    attempts: u32,
}

/// Calls that a client waits for: an unreachable S3 is noticed in less than two seconds.
const ASKING: Patience = Patience { attempt: Duration::from_millis(1200), total: Duration::from_millis(1800), attempts: 2 };
/// The health check must answer before whoever probes us gives up, often after two seconds.
const PULSE: Patience = Patience { attempt: Duration::from_millis(1400), total: Duration::from_millis(1400), attempts: 1 };
/// Completing puts thousands of parts together. Once: a second try would only find that the upload is gone.
pub(super) const FINISHING: Patience = Patience { attempt: Duration::from_secs(60), total: Duration::from_secs(60), attempts: 1 };
/// Removing a large object is slow on some stores, and nobody waits for it.
pub(super) const REMOVING: Patience = Patience { attempt: Duration::from_secs(15), total: Duration::from_secs(30), attempts: 2 };
/// Until the first byte; the stream has a limit of its own.
pub(super) const READING: Patience = Patience { attempt: Duration::from_secs(20), total: Duration::from_secs(30), attempts: 2 };

/// A connection in a data centre takes a millisecond, or it will not come.
const CONNECT: Duration = Duration::from_millis(800);
const BACKOFF: Duration = Duration::from_millis(50);

impl Patience {
    fn timeouts(self) -> TimeoutConfig {
        TimeoutConfig::builder()
            .connect_timeout(CONNECT)
            .operation_attempt_timeout(self.attempt)
            .operation_timeout(self.total)
            .build()
    }

    fn retries(self) -> RetryConfig {
        RetryConfig::standard().with_max_attempts(self.attempts).with_initial_backoff(BACKOFF).with_max_backoff(BACKOFF)
    }
}

/// The override for a call that needs another patience than [`ASKING`].
pub(super) fn patient(patience: Patience) -> Builder {
    Config::builder().timeout_config(patience.timeouts()).retry_config(patience.retries())
}

impl Objects {
    /// Makes the clients. No call to S3 is made: a broker starts while S3 is away.
    ///
    /// # Errors
    /// As [`Settings::check`], or where no region can be found.
    pub async fn connect(settings: &Settings) -> Result<Objects, Error> {
        settings.check()?;
        let own_key = pair(OWN_KEY, &settings.access_key_id, &settings.secret_access_key)?;
        let signing_key = pair(SIGNING_KEY, &settings.signing_access_key_id, &settings.signing_secret_access_key)?;
        let shared = load(settings, own_key).await?;
        let own_key =
            shared.credentials_provider().ok_or_else(|| Error::Settings("there is no source of credentials".to_owned()))?;
        let signing_key = signing_key.unwrap_or_else(|| own_key.clone());

        let inside = config(&shared, settings);
        let public = match &settings.public_endpoint {
            Some(endpoint) => inside.clone().endpoint_url(endpoint).force_path_style(settings.force_path_style.unwrap_or(true)),
            None => inside.clone(),
        };
        Ok(Objects(Arc::new(Inner {
            calls: Client::from_conf(inside.clone().build()),
            uploads: Signer::new(public.clone(), signing_key.clone()),
            downloads: Signer::new(public, own_key),
            inside: Signer::new(inside, signing_key),
            bucket: settings.bucket.clone(),
            defaults: Defaults::default(),
        })))
    }

    /// Whether S3 answers us.
    ///
    /// # Errors
    /// Where it does not within 1.5 seconds, or refuses us the default bucket.
    pub async fn reachable(&self) -> Result<(), Error> {
        let Some(bucket) = &self.0.bucket else {
            let answer = self.0.calls.list_buckets().max_buckets(1).customize().config_override(patient(PULSE)).send().await;
            return match answer {
                Ok(_) => Ok(()),
                // Few may list buckets; that S3 says so is answer enough.
                Err(error) if code(&error) == "AccessDenied" => Ok(()),
                Err(error) => Err(failed("ListBuckets", &error)),
            };
        };
        match self.0.calls.head_bucket().bucket(bucket).customize().config_override(patient(PULSE)).send().await {
            Ok(_) => Ok(()),
            Err(error) => Err(failed("HeadBucket", &error)),
        }
    }
}

/// A credential of the settings; both halves or none.
fn pair(
    [name, secret_name]: [&str; 2],
    id: &Option<String>,
    secret: &Option<String>,
) -> Result<Option<SharedCredentialsProvider>, Error> {
    match (id, secret) {
        (None, None) => Ok(None),
        (Some(id), Some(secret)) => {
            let key = Credentials::new(id, secret, None, None, "lfs-broker settings");
            Ok(Some(SharedCredentialsProvider::new(key)))
        }
        _ => Err(Error::Settings(format!("{name} and {secret_name} belong together, only one is set"))),
    }
}

/// Whether the endpoint is another than Amazon's.
fn has_endpoint(settings: &Settings) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    settings.endpoint.is_some() || set("AWS_ENDPOINT_URL_S3") || set("AWS_ENDPOINT_URL")
}

/// Reads the environment and the AWS files.
async fn load(settings: &Settings, key: Option<SharedCredentialsProvider>) -> Result<SdkConfig, Error> {
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
    if let Some(key) = key {
        loader = loader.credentials_provider(key);
    }
    if let Some(region) = &settings.region {
        loader = loader.region(Region::new(region.clone()));
    } else if has_endpoint(settings) {
        // Without the instance metadata service, which is asked over the network and knows nothing of other stores.
        loader = loader.region(
            RegionProviderChain::first_try(aws_config::environment::EnvironmentVariableRegionProvider::new())
                .or_else(aws_config::profile::ProfileFileRegionProvider::new())
                .or_else(Region::new("us-east-1")),
        );
    }
    let shared = loader.load().await;
    match shared.region() {
        Some(_) => Ok(shared),
        None => Err(Error::Settings("no region is set: set s3.region or AWS_REGION".to_owned())),
    }
}

/// What every client has in common.
fn config(shared: &SdkConfig, settings: &Settings) -> Builder {
    let mut config = Builder::from(shared)
        .force_path_style(settings.force_path_style.unwrap_or_else(|| has_endpoint(settings)))
        .timeout_config(ASKING.timeouts())
        .retry_config(ASKING.retries())
        // A reader that pauses to hash is not a stalled stream; `Reading` keeps the time itself.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        // Checksums are ours to state; one that the SDK adds would be signed and then expected of the client.
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
    fn settings_never_show_their_secrets() {
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
    async fn half_a_credential_is_refused() {
        let settings = Settings { access_key_id: Some("AKID".to_owned()), ..Settings::default() };
        assert!(matches!(Objects::connect(&settings).await, Err(Error::Settings(_))));
    }

    #[tokio::test]
    async fn an_unreachable_store_is_noticed_in_less_than_two_seconds() {
        // Bound and never accepted from: the connection opens, and no answer comes.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = Settings {
            bucket: Some("b".to_owned()),
            endpoint: Some(format!("http://{}", silent.local_addr().unwrap())),
            access_key_id: Some("AKID".to_owned()),
            secret_access_key: Some("secret".to_owned()),
            ..Settings::default()
        };
        let objects = Objects::connect(&settings).await.unwrap();
        let place = super::super::Place { bucket: "b".to_owned(), key: "k".to_owned() };
        let begun = std::time::Instant::now();
        let (reachable, head) = tokio::join!(objects.reachable(), objects.head(&place, None));
        assert!(matches!(reachable, Err(Error::Unavailable(_))), "{reachable:?}");
        assert!(matches!(head, Err(Error::Unavailable(_))), "{head:?}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }
}
