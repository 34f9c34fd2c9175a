//! Own access to S3, for consumers that fetch without asking a broker.
//!
//! A pointer is only what somebody wrote into Kafka. So whoever holds keys says which buckets and prefixes pointers may
//! lead to; a pointer to anything else is refused before a request is signed.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use crate::api::SignedRequest;
use crate::error::Error;

#[cfg(feature = "keys")]
mod keys;
#[cfg(feature = "keys")]
pub use keys::Keys;

/// An object's address in S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The bucket.
    pub bucket: String,
    /// The key, without a leading slash.
    pub key: String,
    /// The version, in buckets that keep several.
    pub version_id: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket, self.key)
    }
}

type Signing = Pin<Box<dyn Future<Output = Result<SignedRequest, Error>> + Send>>;

/// Who signs GETs, and what may be read by them: nothing, until [`allow`](Self::allow) says so.
#[derive(Clone)]
pub struct Access {
    sign: Arc<dyn Fn(Place) -> Signing + Send + Sync>,
    allowed: Vec<(String, String)>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl Access {
    /// Signs by a function of the caller's, for instance the AWS SDK with whatever source of credentials it has:
    ///
    /// ```no_run
    /// # async fn sdk() -> Result<(), lfs_broker_client::Error> {
    /// use std::time::Duration;
    /// use aws_sdk_s3::presigning::PresigningConfig;
    /// use lfs_broker_client::{Access, Error, Place, Resolver, api::SignedRequest};
    ///
    /// let s3 = aws_sdk_s3::Client::new(&aws_config::load_from_env().await);
    /// let life = Duration::from_secs(900);
    /// let access = Access::signed_by(move |place: Place| {
    ///     let get = s3.get_object().bucket(place.bucket).key(place.key).set_version_id(place.version_id);
    ///     async move {
    ///         let window = PresigningConfig::expires_in(life).map_err(Error::signing)?;
    ///         Ok(SignedRequest::get(get.presigned(window).await.map_err(Error::signing)?.uri(), life))
    ///     }
    /// });
    /// let resolver = Resolver::with_access(access.allow("lfs", "acme/"))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn signed_by<S, F>(sign: S) -> Self
    where
        S: Fn(Place) -> F + Send + Sync + 'static,
        F: Future<Output = Result<SignedRequest, Error>> + Send + 'static,
    {
        Self { sign: Arc::new(move |place| Box::pin(sign(place))), allowed: Vec::new() }
    }

    /// Signs with keys at hand.
    #[cfg(feature = "keys")]
    pub fn with_keys(keys: Keys) -> Self {
        let keys = Arc::new(keys);
        Self::signed_by(move |place| std::future::ready(keys.sign(&place)))
    }

    /// Lets pointers lead to the keys of `bucket` that begin with `prefix`; an empty one means the whole bucket.
    #[must_use]
    pub fn allow(mut self, bucket: impl Into<String>, prefix: impl Into<String>) -> Self {
        self.allowed.push((bucket.into(), prefix.into()));
        self
    }

    /// Signs a GET of `place`, if it is one that may be read.
    pub(crate) async fn sign(&self, place: &Place) -> Result<SignedRequest, Error> {
        let allowed = |(bucket, prefix): &(String, String)| *bucket == place.bucket && place.key.starts_with(prefix.as_str());
        if !self.allowed.iter().any(allowed) || !is_plain(&place.key) {
            return Err(Error::Forbidden { reason: format!("{place} is outside what this reader may fetch"), problem: None });
        }
        (self.sign)(place.clone()).await
    }
}

/// Whether a key is a path without tricks: what HTTP clients and some stores fold up would leave its prefix.
fn is_plain(key: &str) -> bool {
    !key.is_empty() && !key.split('/').any(|segment| matches!(segment, "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_pointer_leads_only_where_it_was_allowed_to() {
        let access = Access::signed_by(|place: Place| async move {
            Ok(SignedRequest::get(format!("http://s3/{place}"), Duration::from_secs(60)))
        });
        let place = |bucket: &str, key: &str| Place { bucket: bucket.to_owned(), key: key.to_owned(), version_id: None };
        assert!(matches!(access.sign(&place("lfs", "acme/1")).await, Err(Error::Forbidden { .. })), "nothing is allowed yet");
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
            let signed = access.sign(&place(bucket, key)).await;
            assert_eq!(signed.is_ok(), allowed, "{bucket}/{key}");
            assert!(allowed || matches!(signed, Err(Error::Forbidden { .. })));
        }
    }
}
