//! Direct access to S3, for consumers that download without a broker.
//!
//! Any producer can write a pointer into Kafka. So the holder of S3 credentials names the buckets and prefixes that
//! pointers may refer to. A pointer to any other object is refused before a request is signed.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use crate::api::SignedRequest;
use crate::error::Error;

#[cfg(feature = "keys")]
mod keys;
#[cfg(feature = "keys")]
pub use keys::Keys;

/// Where an object is in S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectLocation {
    /// The bucket.
    pub bucket: String,
    /// The key, without a leading slash.
    pub key: String,
    /// The version, in versioned buckets.
    pub version_id: Option<String>,
}

impl fmt::Display for ObjectLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket, self.key)
    }
}

type SignFuture = Pin<Box<dyn Future<Output = Result<SignedRequest, Error>> + Send>>;

/// Signs GETs of allowed objects. Nothing is allowed until [`allow`](Self::allow) is called.
#[derive(Clone)]
pub struct Access {
    sign: Arc<dyn Fn(ObjectLocation) -> SignFuture + Send + Sync>,
    allowed: Vec<(String, String)>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl Access {
    /// Signs with a function of the caller, for example with the AWS SDK and any of its credential sources:
    ///
    /// ```no_run
    /// # async fn sdk() -> Result<(), lfs_broker_client::Error> {
    /// use std::time::Duration;
    /// use aws_sdk_s3::presigning::PresigningConfig;
    /// use lfs_broker_client::{Access, Error, ObjectLocation, Resolver, api::SignedRequest};
    ///
    /// let s3 = aws_sdk_s3::Client::new(&aws_config::load_from_env().await);
    /// let lifetime = Duration::from_secs(900);
    /// let access = Access::signed_by(move |location: ObjectLocation| {
    ///     let get = s3.get_object().bucket(location.bucket).key(location.key).set_version_id(location.version_id);
    ///     async move {
    ///         let config = PresigningConfig::expires_in(lifetime).map_err(Error::signing)?;
    ///         Ok(SignedRequest::get(get.presigned(config).await.map_err(Error::signing)?.uri(), lifetime))
    ///     }
    /// });
    /// let resolver = Resolver::with_access(access.allow("lfs", "acme/"))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn signed_by<S, F>(sign: S) -> Self
    where
        S: Fn(ObjectLocation) -> F + Send + Sync + 'static,
        F: Future<Output = Result<SignedRequest, Error>> + Send + 'static,
    {
        Self { sign: Arc::new(move |location| Box::pin(sign(location))), allowed: Vec::new() }
    }

    /// Signs with the given access key.
    #[cfg(feature = "keys")]
    pub fn with_keys(keys: Keys) -> Self {
        let keys = Arc::new(keys);
        Self::signed_by(move |location| std::future::ready(keys.sign(&location)))
    }

    /// Allows pointers to the keys of `bucket` that begin with `prefix`. An empty prefix allows the whole bucket.
    #[must_use]
    pub fn allow(mut self, bucket: impl Into<String>, prefix: impl Into<String>) -> Self {
        self.allowed.push((bucket.into(), prefix.into()));
        self
    }

    /// Signs a GET of `location` if it is allowed.
    pub(crate) async fn sign(&self, location: &ObjectLocation) -> Result<SignedRequest, Error> {
        let allowed =
            |(bucket, prefix): &(String, String)| *bucket == location.bucket && location.key.starts_with(prefix.as_str());
        if !self.allowed.iter().any(allowed) || !is_normalized(&location.key) {
            return Err(Error::Forbidden {
                reason: format!("{location} is not in the allowed buckets and prefixes"),
                problem: None,
            });
        }
        (self.sign)(location.clone()).await
    }
}

/// Whether a key is not empty and has no dot segments. HTTP clients and some stores resolve `..`, which could leave the
/// allowed prefix.
fn is_normalized(key: &str) -> bool {
    !key.is_empty() && !key.split('/').any(|segment| matches!(segment, "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn only_objects_in_allowed_buckets_and_prefixes_are_signed() {
        let access = Access::signed_by(|location: ObjectLocation| async move {
            Ok(SignedRequest::get(format!("http://s3/{location}"), Duration::from_secs(60)))
        });
        let location =
            |bucket: &str, key: &str| ObjectLocation { bucket: bucket.to_owned(), key: key.to_owned(), version_id: None };
        assert!(matches!(access.sign(&location("lfs", "acme/1")).await, Err(Error::Forbidden { .. })), "nothing is allowed yet");
        let access = access.allow("lfs", "acme/").allow("other", "");
        for (bucket, key, allowed) in [
            ("lfs", "acme/1", true),
            ("other", "x", true),
            ("lfs", "acme", false),
            ("lfs", "evil/1", false),
            ("lfs", "acme/../evil/1", false),
            ("lfs", "acme/./1", false),
            ("third", "acme/1", false),
            ("other", "", false),
        ] {
            let signed = access.sign(&location(bucket, key)).await;
            assert_eq!(signed.is_ok(), allowed, "{bucket}/{key}");
            assert!(allowed || matches!(signed, Err(Error::Forbidden { .. })));
        }
    }
}
