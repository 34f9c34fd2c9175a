//! The probe: does this S3 store enforce the signed headers of a presigned URL?
//!
//! The probe acts like an attacker: it misuses real presigned URLs under its own prefix, and then cleans up. Stores differ,
//! and the broker's guarantees depend on the results, so `serve` and `doctor` run the probe first.

use std::collections::BTreeSet;
use std::time::Duration;

use lfs_broker_client::checksum::{Digest, Sha256};
use reqwest::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, CONTENT_LENGTH, ORIGIN,
};
use reqwest::{Client, Method, StatusCode, redirect};
use serde::Serialize;
use tracing::{debug, warn};
use uuid::Uuid;

use super::presign::Signer;
use super::put_response::PutResponse;
use super::{Error, NewObject, ObjectLocation, Objects, PresignedUrl};
use crate::session::Object;
use crate::telemetry::error_chain;

/// The last segment of the valid object's key, and its write token. Buckets with Object Lock keep objects of this name.
const VALID_OBJECT: &str = "honest";
/// The bytes that the probe declares and sends.
const VALID_BYTES: &[u8] = b"hello";
/// Other bytes of the same length.
const WRONG_BYTES: &[u8] = b"jello";
/// The default lifetime of an upload URL, so that a wrong clock affects the probe and the uploads in the same way.
const URL_LIFETIME: Duration = Duration::from_secs(900);
/// One request carries five bytes, so a longer time means that the network or the store does not respond.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A public endpoint that takes longer to connect counts as unreachable for the broker.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest duration of a probe. Older probe objects belong to a probe that no longer runs.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(60);
/// One PUT and its HEAD on a slow endpoint.
const PUT_TIMEOUT: Duration = Duration::from_secs(20);
/// The key prefix of all probe objects.
const PROBE_PREFIX: &str = ".lfs-broker-probe/";
/// The shared prefix of all probes in a bucket whose objects cannot be deleted, so that at most one object per key remains.
const UNDELETABLE_PREFIX: &str = ".lfs-broker-probe/kept";
/// The longest cleanup, so that a store that became unreachable does not block the caller.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(30);
/// The origin of an arbitrary web page. The probe cannot detect a CORS rule that allows only another origin.
const CORS_ORIGIN: &str = "https://lfs-broker.example";
/// The headers of an upload that need permission from a CORS rule.
const CORS_HEADERS: &str = "content-type,if-none-match,x-amz-checksum-sha256,x-amz-meta-lfs-upload-id";

/// The behaviour of an S3 store, as the probe observed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Capabilities {
    /// A PUT whose bytes do not match the signed SHA-256 fails and stores nothing.
    pub refuses_wrong_bytes: bool,
    /// A second PUT to the same key fails and changes nothing.
    pub refuses_overwrite: bool,
    /// A PUT with an unsigned `x-amz-copy-source` fails.
    pub refuses_unsigned_copy_source_put: bool,
    /// A PUT of a part with an unsigned `x-amz-copy-source` fails.
    pub refuses_unsigned_copy_source_part: bool,
    /// A PUT with another size than the signed size fails.
    pub refuses_other_size: bool,
    /// A PUT with an unsigned `Content-Encoding` fails, or the store drops the header. If the store keeps the header,
    /// complete rejects the object.
    pub refuses_unsigned_content_encoding: bool,
    /// As `refuses_unsigned_content_encoding`, for `x-amz-tagging`.
    pub refuses_unsigned_tagging: bool,
    /// As `refuses_unsigned_content_encoding`, for `x-amz-storage-class`.
    pub refuses_unsigned_storage_class: bool,
    /// An unsigned `x-amz-checksum-algorithm` does not disable the check of the signed SHA-256. If it does, the holder of a
    /// URL can store other bytes of the same size, and complete rejects them.
    pub refuses_unsigned_checksum_algorithm: bool,
    /// An unsigned `x-amz-acl` does not make the object public.
    pub refuses_unsigned_acl: bool,
    /// HEAD returns the write token, which is signed metadata of the PUT.
    pub keeps_token: bool,
    /// HEAD returns the SHA-256 of the whole object.
    pub returns_sha256_on_head: bool,
    /// A browser page of another origin may PUT to the public endpoint; null if the broker cannot reach that endpoint.
    pub answers_cors: Option<bool>,
    /// The bucket is versioned.
    pub versioned: bool,
    /// Object Lock retains every object by a default retention, so objects of failed uploads remain until the retention ends.
    pub object_lock: bool,
}

impl Capabilities {
    /// Whether the store prevents the holder of an upload URL from copying objects that the signing key may read.
    pub fn refuses_copy_source(&self) -> bool {
        self.refuses_unsigned_copy_source_put && self.refuses_unsigned_copy_source_part
    }
}

impl Objects {
    /// Tests the store with about twenty small requests under `.lfs-broker-probe/`, and always removes its objects. In a
    /// bucket whose Object Lock retains every object, each probe uses the same few objects.
    ///
    /// # Errors
    /// If a valid PUT fails, or the store stops answering.
    pub async fn probe(&self, bucket: &str) -> Result<Capabilities, Error> {
        let mut probe = self.new_probe(bucket).await?;
        let capabilities = with_timeout(PROBE_TIMEOUT, Box::pin(probe.run())).await;
        probe.clean_up(capabilities).await
    }

    /// Puts an object through a presigned URL, as a client does, reads it with HEAD, and removes it.
    ///
    /// # Errors
    /// The reason why a PUT of a client would fail now.
    pub async fn probe_put(&self, bucket: &str, kms_key_id: Option<&str>) -> Result<(), Error> {
        let mut probe = self.new_probe(bucket).await?;
        probe.kms_key_id = kms_key_id;
        let put = with_timeout(PUT_TIMEOUT, Box::pin(probe.put_only())).await;
        if !probe.is_undeletable {
            let removed = with_timeout(PUT_TIMEOUT, self.delete_versions(&probe.location(VALID_OBJECT))).await;
            match removed {
                Ok(_) => {}
                // The next probes use fixed keys, so that the number of undeletable objects does not grow.
                Err(error @ (Error::Refused { .. } | Error::Locked { .. })) => probe.mark_undeletable(&error),
                // `remove_stale_probes` removes the object at the next start.
                Err(error) => {
                    debug!(%error, "the object of a readiness check remains in bucket {bucket} until the next start: {error}");
                }
            }
        }
        put
    }

    /// Adds the endpoint to an error without an answer: the probe's first call shows a wrong endpoint.
    fn with_endpoint(&self, error: Error) -> Error {
        match error {
            Error::Unavailable(reason) => {
                Error::Unavailable(format!("{reason}; the endpoint is {}, set AWS_ENDPOINT_URL_S3 to change it", self.0.endpoint))
            }
            error => error,
        }
    }

    async fn new_probe<'a>(&'a self, bucket: &'a str) -> Result<Probe<'a>, Error> {
        let undeleted = ObjectLocation { bucket: bucket.to_owned(), key: format!("{UNDELETABLE_PREFIX}/{VALID_OBJECT}") };
        let is_locked = self.0.bucket_defaults.accepts_any(bucket)
            || self.has_default_retention(bucket, &undeleted).await.map_err(|error| self.with_endpoint(error))?;
        let is_undeletable = is_locked || self.0.bucket_defaults.is_undeletable(bucket);
        let prefix = if is_undeletable { UNDELETABLE_PREFIX.to_owned() } else { format!("{PROBE_PREFIX}{}", Uuid::new_v4()) };
        let http = Client::builder().connect_timeout(CONNECT_TIMEOUT).timeout(REQUEST_TIMEOUT);
        let http = http.redirect(redirect::Policy::none()).build().map_err(|error| Error::Settings(error_chain(&error)))?;
        Ok(Probe { objects: self, http, bucket, prefix, is_undeletable, is_locked, kms_key_id: None })
    }

    /// Removes the objects of probes whose broker died, or whose store became unreachable, before the cleanup. It lists the
    /// objects, waits `after` until every running probe has ended ([`PROBE_TIMEOUT`]), and then removes them. It returns
    /// when no such object remains.
    ///
    /// # Errors
    /// If S3 does not answer; a repeated call continues.
    pub async fn remove_stale_probes(&self, bucket: &str, after: Duration) -> Result<(), Error> {
        let mut locked_prefixes = BTreeSet::new();
        loop {
            let page = self.list(bucket, PROBE_PREFIX, None).await?;
            let prefixes: BTreeSet<String> =
                page.items.iter().filter_map(|object| Some(object.key.rsplit_once('/')?.0.to_owned())).collect();
            let prefixes: BTreeSet<String> =
                prefixes.into_iter().filter(|prefix| prefix != UNDELETABLE_PREFIX && !locked_prefixes.contains(prefix)).collect();
            if prefixes.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(after).await;
            for prefix in prefixes {
                let probe = Probe {
                    objects: self,
                    http: Client::new(),
                    bucket,
                    prefix,
                    is_undeletable: false,
                    is_locked: false,
                    kms_key_id: None,
                };
                match probe.remove_objects().await {
                    Err(Error::Locked { .. }) => drop(locked_prefixes.insert(probe.prefix)),
                    removed => removed?,
                }
            }
        }
    }
}

/// One run of the probe. Each test uses its own key, so that no result depends on another test.
struct Probe<'a> {
    objects: &'a Objects,
    http: Client,
    bucket: &'a str,
    prefix: String,
    /// Whether objects in this bucket cannot be deleted. Then every probe uses the same keys and removes nothing.
    is_undeletable: bool,
    /// Whether Object Lock is the reason.
    is_locked: bool,
    /// The KMS key that the topics of this bucket encrypt their objects with.
    kms_key_id: Option<&'a str>,
}

/// The last segments of the keys, in the order of their removal. The first object written is removed last, so it exists as
/// long as any other object of the probe.
const KEYS: [&str; 10] = [
    "copy-part",
    "copy",
    "acl",
    "checksum-algorithm",
    "storage-class",
    "tagging",
    "content-encoding",
    "other-size",
    "wrong-bytes",
    VALID_OBJECT,
];

impl<'a> Probe<'a> {
    async fn run(&mut self) -> Result<Capabilities, Error> {
        let digest = Digest::from(Sha256::of(VALID_BYTES));
        let (signer, answers_cors) = self.reachable_signer().await?;
        let found = self.put_valid_and_detect_lock(signer, &digest).await?;
        let valid = self.location(VALID_OBJECT);
        let (longer, source) = ([VALID_BYTES, VALID_BYTES].concat(), format!("/{valid}"));
        let (class, algorithm) = (("x-amz-storage-class", "REDUCED_REDUNDANCY"), ("x-amz-checksum-algorithm", "CRC32"));
        // The tests run concurrently, because each has its own key. They are boxed, because ten SDK calls are too large for
        // a thread's stack. The copy test signs no checksum: a mismatch with the copied bytes would hide an accepted copy.
        let signed_properties = async {
            tokio::try_join!(
                Box::pin(self.refuses(signer, "wrong-bytes", Some(&digest), WRONG_BYTES, None)),
                Box::pin(self.refuses_overwrite(signer, &valid, &digest, &found)),
                Box::pin(self.refuses(signer, "other-size", None, &longer, None)),
                Box::pin(self.refuses(signer, "copy", None, WRONG_BYTES, Some(("x-amz-copy-source", &source)))),
                Box::pin(self.refuses_copy_part(signer, &valid)),
            )
        };
        let unsigned_headers = async {
            tokio::try_join!(
                Box::pin(self.refuses_or_drops(signer, "content-encoding", ("content-encoding", "gzip"))),
                Box::pin(self.refuses_or_drops(signer, "tagging", ("x-amz-tagging", "a=b"))),
                Box::pin(self.refuses_or_drops(signer, "storage-class", class)),
                Box::pin(self.refuses(signer, "checksum-algorithm", Some(&digest), WRONG_BYTES, Some(algorithm))),
                Box::pin(self.refuses_acl(signer, &digest)),
            )
        };
        let (signed_properties, unsigned_headers) = tokio::try_join!(signed_properties, unsigned_headers)?;
        let capabilities = Capabilities {
            refuses_wrong_bytes: signed_properties.0,
            refuses_overwrite: signed_properties.1,
            refuses_unsigned_copy_source_put: signed_properties.3,
            refuses_unsigned_copy_source_part: signed_properties.4,
            refuses_other_size: signed_properties.2,
            refuses_unsigned_content_encoding: unsigned_headers.0,
            refuses_unsigned_tagging: unsigned_headers.1,
            refuses_unsigned_storage_class: unsigned_headers.2,
            refuses_unsigned_checksum_algorithm: unsigned_headers.3,
            refuses_unsigned_acl: unsigned_headers.4,
            keeps_token: found.token.as_deref() == Some(VALID_OBJECT),
            returns_sha256_on_head: found.sha256 == digest.sha256(),
            answers_cors,
            versioned: found.version_id.is_some(),
            object_lock: self.is_undeletable,
        };
        self.learn_bucket_defaults(&found);
        Ok(capabilities)
    }

    async fn put_only(&mut self) -> Result<(), Error> {
        let digest = Digest::from(Sha256::of(VALID_BYTES));
        let (signer, answers_cors) = self.reachable_signer().await?;
        let found = match self.put_valid_and_detect_lock(signer, &digest).await {
            // From the broker's network another server may answer under the public host name, while clients reach the store.
            Err(refused @ Error::Refused { .. }) if answers_cors.is_some() => {
                let internal = self.put_valid_and_detect_lock(&self.objects.0.internal_upload_signer, &digest).await;
                internal.map_err(|_| refused)?
            }
            put => put?,
        };
        self.learn_bucket_defaults(&found);
        Ok(())
    }

    /// The signer whose endpoint the broker can reach, and whether the public endpoint answers CORS requests.
    async fn reachable_signer(&self) -> Result<(&'a Signer, Option<bool>), Error> {
        Ok(match self.preflight(&self.location(VALID_OBJECT)).await? {
            Some(answers_cors) => (&self.objects.0.upload_signer, Some(answers_cors)),
            None => (&self.objects.0.internal_upload_signer, None),
        })
    }

    /// Puts the valid object. If Object Lock retains it, the object remains, and the probe changes to the shared keys of
    /// such buckets and puts it again.
    async fn put_valid_and_detect_lock(&mut self, signer: &Signer, digest: &Digest) -> Result<Object, Error> {
        let found = self.put_valid(signer, &self.location(VALID_OBJECT), digest).await?;
        let is_locked = found.undeclared_headers.iter().any(|(name, _)| name == "x-amz-object-lock-mode");
        if self.is_undeletable || !is_locked {
            return Ok(found);
        }
        (self.is_undeletable, self.is_locked) = (true, true);
        UNDELETABLE_PREFIX.clone_into(&mut self.prefix);
        self.put_valid(signer, &self.location(VALID_OBJECT), digest).await
    }

    fn learn_bucket_defaults(&self, valid: &Object) {
        match self.is_locked {
            true => self.objects.0.bucket_defaults.accept_any(self.bucket),
            false => self.objects.0.bucket_defaults.learn(self.bucket, &valid.undeclared_headers),
        }
    }

    /// Sends a CORS preflight as a browser does; `None` if the public endpoint does not answer.
    async fn preflight(&self, location: &ObjectLocation) -> Result<Option<bool>, Error> {
        let presigned = self.objects.0.upload_signer.put(&valid_object(location, None), URL_LIFETIME).await?;
        let url = presigned.url.split('?').next().unwrap_or_default();
        let request = self
            .http
            .request(Method::OPTIONS, url)
            .header(ORIGIN, CORS_ORIGIN)
            .header(ACCESS_CONTROL_REQUEST_METHOD, "PUT")
            .header(ACCESS_CONTROL_REQUEST_HEADERS, CORS_HEADERS);
        let Ok(response) = request.send().await else { return Ok(None) };
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let origin = header(ACCESS_CONTROL_ALLOW_ORIGIN);
        let lists = |name, word: &str| {
            header(name).split(',').map(str::trim).any(|listed| listed == "*" || listed.eq_ignore_ascii_case(word))
        };
        Ok(Some(
            response.status().is_success()
                && (origin == "*" || origin == CORS_ORIGIN)
                && lists(ACCESS_CONTROL_ALLOW_METHODS, "PUT")
                && CORS_HEADERS.split(',').all(|name| lists(ACCESS_CONTROL_ALLOW_HEADERS, name)),
        ))
    }

    async fn put_valid(&self, signer: &Signer, location: &ObjectLocation, digest: &Digest) -> Result<Object, Error> {
        let object = NewObject { kms_key_id: self.kms_key_id, ..valid_object(location, Some(digest)) };
        let response = self.put(&signer.put(&object, URL_LIFETIME).await?, VALID_BYTES, None).await?;
        // An object of an earlier probe may remain under the shared key. Then 412 shows that the store accepts the signature.
        let exists = self.is_undeletable && response.status == StatusCode::PRECONDITION_FAILED;
        if !response.status.is_success() && !exists {
            return Err(response.to_error(self.bucket));
        }
        let found = self.objects.head(location, None).await?;
        found.ok_or_else(|| Error::Refused {
            code: "NotFound".to_owned(),
            message: format!("a presigned PUT was answered 200, but the broker's endpoint has no object {location}"),
        })
    }

    /// Whether the store refuses a PUT with other bytes or with an unsigned header, and stores nothing.
    async fn refuses(
        &self,
        signer: &Signer,
        key: &str,
        digest: Option<&Digest>,
        bytes: &[u8],
        unsigned_header: Option<(&str, &str)>,
    ) -> Result<bool, Error> {
        let location = self.location(key);
        if self.was_stored_before(&location).await? {
            return Ok(false);
        }
        let presigned = signer.put(&valid_object(&location, digest), URL_LIFETIME).await?;
        let status = self.put(&presigned, bytes, unsigned_header).await?.status;
        Ok(!status.is_success() && self.objects.head(&location, None).await?.is_none())
    }

    /// Whether the store refuses a PUT with an unsigned header, or drops the header.
    async fn refuses_or_drops(&self, signer: &Signer, key: &str, header: (&str, &str)) -> Result<bool, Error> {
        let location = self.location(key);
        if !self.was_stored_before(&location).await? {
            self.put(&signer.put(&valid_object(&location, None), URL_LIFETIME).await?, VALID_BYTES, Some(header)).await?;
        }
        let found = self.objects.head(&location, None).await?;
        Ok(!found.is_some_and(|found| found.undeclared_headers.iter().any(|(name, _)| name.starts_with(header.0))))
    }

    /// Whether the store prevents the holder of a URL from making the object public.
    async fn refuses_acl(&self, signer: &Signer, digest: &Digest) -> Result<bool, Error> {
        let location = self.location("acl");
        let presigned = signer.put(&valid_object(&location, Some(digest)), URL_LIFETIME).await?;
        if !self.was_stored_before(&location).await? {
            self.put(&presigned, VALID_BYTES, Some(("x-amz-acl", "public-read"))).await?;
        }
        // An anonymous GET: the URL without its signature.
        let response = self.http.get(presigned.url.split('?').next().unwrap_or_default()).send().await;
        let unavailable = |error: reqwest::Error| {
            Error::Unavailable(format!("an unsigned GET of {location} failed: {}", error_chain(&error.without_url())))
        };
        Ok(!response.map_err(unavailable)?.status().is_success())
    }

    /// Whether an earlier probe stored this object and it cannot be deleted. Then the test is not repeated.
    async fn was_stored_before(&self, location: &ObjectLocation) -> Result<bool, Error> {
        Ok(self.is_undeletable && self.objects.head(location, None).await?.is_some())
    }

    async fn refuses_overwrite(
        &self,
        signer: &Signer,
        location: &ObjectLocation,
        digest: &Digest,
        found: &Object,
    ) -> Result<bool, Error> {
        let object = NewObject { token: "again", ..valid_object(location, Some(digest)) };
        let status = self.put(&signer.put(&object, URL_LIFETIME).await?, VALID_BYTES, None).await?.status;
        Ok(!status.is_success() && self.objects.head(location, None).await?.as_ref() == Some(found))
    }

    async fn refuses_copy_part(&self, signer: &Signer, source: &ObjectLocation) -> Result<bool, Error> {
        let location = self.location("copy-part");
        let id = self.objects.create_multipart_upload_for_probe(&valid_object(&location, None), false).await?;
        let presigned = signer.part(&location, &id, 1, WRONG_BYTES.len() as u64, None, URL_LIFETIME).await?;
        let copy_source = format!("/{source}");
        let status = self.put(&presigned, WRONG_BYTES, Some(("x-amz-copy-source", &copy_source))).await?.status;
        let parts = self.objects.list_parts(&location, &id).await?.unwrap_or_default();
        Ok(!status.is_success() && parts.is_empty())
    }

    /// Sends a presigned PUT with these bytes and, if given, one unsigned header.
    async fn put(
        &self,
        presigned: &PresignedUrl,
        bytes: &[u8],
        unsigned_header: Option<(&str, &str)>,
    ) -> Result<PutResponse, Error> {
        let mut request = self.http.put(&presigned.url).body(bytes.to_vec());
        // The HTTP client sets the length from the body, as a browser does.
        let headers = presigned.headers.iter().filter(|(name, _)| *name != CONTENT_LENGTH.as_str());
        for (name, value) in headers.map(|(name, value)| (name.as_str(), value.as_str())).chain(unsigned_header) {
            request = request.header(name, value);
        }
        match request.send().await {
            Ok(response) => Ok(PutResponse::read(response).await),
            Err(error) => Err(Error::Unavailable(format!(
                "a presigned PUT to bucket {} failed: {}",
                self.bucket,
                error_chain(&error.without_url())
            ))),
        }
    }

    /// Removes the objects of the probe. If the broker may not delete them, the outcome stays valid, but later probes use
    /// the shared keys, so that the number of remaining objects does not grow.
    async fn clean_up<T>(&self, outcome: Result<T, Error>) -> Result<T, Error> {
        let removed = with_timeout(CLEANUP_TIMEOUT, self.remove_objects()).await;
        // An earlier failure usually makes the cleanup fail too, so the earlier failure is the one to return.
        let found = outcome?;
        match removed {
            Err(error @ (Error::Refused { .. } | Error::Locked { .. })) => {
                self.mark_undeletable(&error);
                Ok(found)
            }
            removed => removed.map(|()| found),
        }
    }

    /// Records that objects in this bucket cannot be deleted, so that the next probes use the shared keys.
    fn mark_undeletable(&self, error: &Error) {
        warn!(
            %error,
            "cannot delete the probe's objects in bucket {}: {error}; later probes use {UNDELETABLE_PREFIX}/",
            self.bucket
        );
        match error {
            Error::Locked { .. } => self.objects.0.bucket_defaults.accept_any(self.bucket),
            _ => self.objects.0.bucket_defaults.mark_undeletable(self.bucket),
        }
    }

    /// Removes every object that the probe may have written. After a failure it continues with the remaining objects, and
    /// then returns the first error.
    async fn remove_objects(&self) -> Result<(), Error> {
        let mut outcome = self.objects.abort_multipart_uploads(&self.location("copy-part"), None).await.map(drop);
        for key in KEYS.into_iter().filter(|_| !self.is_undeletable) {
            let removed = self.objects.delete_versions(&self.location(key)).await.map(drop);
            outcome = outcome.and(removed);
        }
        outcome
    }

    fn location(&self, key: &str) -> ObjectLocation {
        ObjectLocation { bucket: self.bucket.to_owned(), key: format!("{}/{key}", self.prefix) }
    }
}

fn valid_object<'a>(location: &'a ObjectLocation, digest: Option<&'a Digest>) -> NewObject<'a> {
    NewObject {
        location,
        token: VALID_OBJECT,
        content_type: "application/octet-stream",
        size_bytes: VALID_BYTES.len() as u64,
        digest,
        kms_key_id: None,
    }
}

async fn with_timeout<T>(limit: Duration, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let timed_out = || Error::Unavailable(format!("the probe of the store did not end within {} s", limit.as_secs()));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
}
