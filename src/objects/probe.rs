//! The probe: does this store hold a client to what we sign?
//!
//! It plays the client that lies, with real presigned URLs under a prefix of its own, and cleans up. Stores differ,
//! and the promises of the broker rest on the answers; `serve` and `doctor` ask before they trust.

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

use super::answer::Answer;
use super::sign::Signer;
use super::{Error, Objects, Place, Put, Signed, chain};
use crate::session::Object;

/// What the probe promises and sends.
const BYTES: &[u8] = b"hello";
/// As long, and not what was promised.
const WRONG: &[u8] = b"jello";
/// As long as an upload's URL lives by default, so that a clock which is off harms both alike.
const LIFE: Duration = Duration::from_secs(900);
/// One request of five bytes; longer means that the way is blocked.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A public endpoint that takes longer to connect is out of the broker's reach.
const CONNECT: Duration = Duration::from_secs(3);
/// The longest trial: what was there before then belongs to one that has ended.
pub const LONGEST_TRIAL: Duration = Duration::from_secs(60);
/// One PUT and its HEAD, by slow endpoints.
const ONE_PUT: Duration = Duration::from_secs(20);
/// Where trials are made.
const TRIALS: &str = ".lfs-broker-probe/";
/// Where all trials are made in a bucket whose Object Lock keeps everything: at most one object a key stays.
const KEPT: &str = ".lfs-broker-probe/kept";
/// Nobody waits longer for a store that went away meanwhile.
const CLEANING: Duration = Duration::from_secs(30);
/// Any web page: a rule for one origin alone is found by its own users.
const SOME_ORIGIN: &str = "https://lfs-broker.example";
/// What a browser sends with a PUT besides what it may always send.
const SOME_HEADERS: &str = "content-type,if-none-match,x-amz-checksum-sha256,x-amz-meta-lfs-upload-id";

/// What a store was seen to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Capabilities {
    /// A PUT whose bytes do not match the signed SHA-256 fails, and stores nothing.
    pub refuses_wrong_bytes: bool,
    /// A second PUT to the same key fails, and changes nothing.
    pub refuses_overwrite: bool,
    /// An `x-amz-copy-source` that we did not sign makes a PUT fail.
    pub refuses_unsigned_copy_source_put: bool,
    /// The same for a part.
    pub refuses_unsigned_copy_source_part: bool,
    /// A PUT of another size than the signed one fails.
    pub refuses_other_size: bool,
    /// A `Content-Encoding` that was not signed makes a PUT fail, or is not kept. Where it is kept, complete refuses the
    /// object; so with the next two.
    pub refuses_unsigned_content_encoding: bool,
    /// The same for `x-amz-tagging`.
    pub refuses_unsigned_tagging: bool,
    /// The same for `x-amz-storage-class`.
    pub refuses_unsigned_storage_class: bool,
    /// An unsigned `x-amz-checksum-algorithm` does not switch the signed SHA-256 off. Where it does, whoever has a URL can
    /// store other bytes of the same size, and complete refuses them.
    pub refuses_unsigned_checksum_algorithm: bool,
    /// An unsigned `x-amz-acl` does not open the object to everybody.
    pub refuses_unsigned_acl: bool,
    /// HEAD shows the metadata that was signed into the PUT.
    pub keeps_token: bool,
    /// HEAD shows the SHA-256 of the whole.
    pub returns_sha256_on_head: bool,
    /// A browser on another origin may PUT to the public endpoint; none where the broker cannot reach that endpoint.
    pub answers_cors: Option<bool>,
    /// The bucket keeps versions.
    pub versioned: bool,
    /// Object Lock keeps every object by a default retention: what failed uploads leave stays until that ends.
    pub object_lock: bool,
}

impl Capabilities {
    /// Whether the holder of an upload URL cannot copy what its signer may read.
    pub fn refuses_copy_source(&self) -> bool {
        self.refuses_unsigned_copy_source_put && self.refuses_unsigned_copy_source_part
    }
}

impl Objects {
    /// Tries the store out: some twenty small requests under `.lfs-broker-probe/`, removed again whatever happens. In a
    /// bucket whose Object Lock keeps everything, the same few objects are used each time.
    ///
    /// # Errors
    /// Where not even an honest PUT works, or the store stops to answer.
    pub async fn probe(&self, bucket: &str) -> Result<Capabilities, Error> {
        let mut trial = self.trial(bucket).await?;
        let seen = within(LONGEST_TRIAL, Box::pin(trial.run())).await;
        trial.end(seen).await
    }

    /// Puts an object as a client does, by a presigned URL, looks at it, and removes it again.
    ///
    /// # Errors
    /// Why a client's PUT would fail now.
    pub async fn try_put(&self, bucket: &str, kms_key_id: Option<&str>) -> Result<(), Error> {
        let mut trial = self.trial(bucket).await?;
        trial.kms_key_id = kms_key_id;
        let put = within(ONE_PUT, Box::pin(trial.try_put())).await;
        if !trial.is_kept {
            let removed = within(ONE_PUT, self.delete_versions(&trial.place("honest"))).await;
            match removed {
                Ok(_) => {}
                // What may not be deleted must not grow.
                Err(error @ (Error::Refused { .. } | Error::Locked { .. })) => trial.stays(&error),
                // `clean_after_trials` finds it at the next start.
                Err(error) => debug!(%error, "the object of a readiness check stays in bucket {bucket}: {error}"),
            }
        }
        put
    }

    async fn trial<'a>(&'a self, bucket: &'a str) -> Result<Trial<'a>, Error> {
        let kept = Place { bucket: bucket.to_owned(), key: format!("{KEPT}/honest") };
        let is_locked = self.0.defaults.is_any_accepted(bucket) || self.is_locked(bucket, &kept).await?;
        let is_kept = is_locked || self.0.defaults.is_kept(bucket);
        let prefix = if is_kept { KEPT.to_owned() } else { format!("{TRIALS}{}", Uuid::new_v4()) };
        let http = Client::builder().connect_timeout(CONNECT).timeout(TIMEOUT).redirect(redirect::Policy::none()).build();
        let http = http.map_err(|error| Error::Settings(chain(&error)))?;
        Ok(Trial { objects: self, http, bucket, prefix, is_kept, is_locked, kms_key_id: None })
    }

    /// Removes what trials have left whose broker died, or whose store went away, in the middle: what is there now and
    /// still there when every trial that runs now has ended, which is after [`LONGEST_TRIAL`]. Returns when nothing is left.
    ///
    /// # Errors
    /// Where S3 does not answer; asking again goes on.
    pub async fn clean_after_trials(&self, bucket: &str, after: Duration) -> Result<(), Error> {
        let mut locked = BTreeSet::new();
        loop {
            let left = self.list(bucket, TRIALS, None).await?;
            let prefixes: BTreeSet<String> =
                left.items.iter().filter_map(|object| Some(object.key.rsplit_once('/')?.0.to_owned())).collect();
            let prefixes: BTreeSet<String> =
                prefixes.into_iter().filter(|prefix| prefix != KEPT && !locked.contains(prefix)).collect();
            if prefixes.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(after).await;
            for prefix in prefixes {
                let trial = Trial {
                    objects: self,
                    http: Client::new(),
                    bucket,
                    prefix,
                    is_kept: false,
                    is_locked: false,
                    kms_key_id: None,
                };
                match trial.clean().await {
                    Err(Error::Locked { .. }) => drop(locked.insert(trial.prefix)),
                    cleaned => cleaned?,
                }
            }
        }
    }
}

/// One run of the probe. Each question has a key of its own, so that no answer depends on another.
struct Trial<'a> {
    objects: &'a Objects,
    http: Client,
    bucket: &'a str,
    prefix: String,
    /// Whether whatever is written stays: then every trial uses the same keys, and removes nothing.
    is_kept: bool,
    /// Whether it is Object Lock that keeps it.
    is_locked: bool,
    /// The key that the topics of this bucket have their objects encrypted with.
    kms_key_id: Option<&'a str>,
}

/// The last pieces of the keys; what is written is removed by this list. What is written first goes last: as long as
/// anything is left of a trial, that is.
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
    "honest",
];

impl<'a> Trial<'a> {
    async fn run(&mut self) -> Result<Capabilities, Error> {
        let digest = Digest::from(Sha256::of(BYTES));
        let (signer, answers_cors) = self.way_in().await?;
        let found = self.put_first(signer, &digest).await?;
        let honest = self.place("honest");
        let (longer, source) = ([BYTES, BYTES].concat(), format!("/{honest}"));
        let (class, algorithm) = (("x-amz-storage-class", "REDUCED_REDUNDANCY"), ("x-amz-checksum-algorithm", "CRC32"));
        // Each question has a key of its own, so they are asked together; on the heap, for ten calls of the SDK are too much
        // for a thread's stack. A copy comes without a checksum: one that did not match the copied bytes would hide the hole.
        let promised = async {
            tokio::try_join!(
                Box::pin(self.refuses(signer, "wrong-bytes", Some(&digest), WRONG, None)),
                Box::pin(self.refuses_overwrite(signer, &honest, &digest, &found)),
                Box::pin(self.refuses(signer, "other-size", None, &longer, None)),
                Box::pin(self.refuses(signer, "copy", None, WRONG, Some(("x-amz-copy-source", &source)))),
                Box::pin(self.refuses_copy_part(signer, &honest)),
            )
        };
        let undeclared = async {
            tokio::try_join!(
                Box::pin(self.drops(signer, "content-encoding", ("content-encoding", "gzip"))),
                Box::pin(self.drops(signer, "tagging", ("x-amz-tagging", "a=b"))),
                Box::pin(self.drops(signer, "storage-class", class)),
                Box::pin(self.refuses(signer, "checksum-algorithm", Some(&digest), WRONG, Some(algorithm))),
                Box::pin(self.refuses_acl(signer, &digest)),
            )
        };
        let (promised, undeclared) = tokio::try_join!(promised, undeclared)?;
        let seen = Capabilities {
            refuses_wrong_bytes: promised.0,
            refuses_overwrite: promised.1,
            refuses_unsigned_copy_source_put: promised.3,
            refuses_unsigned_copy_source_part: promised.4,
            refuses_other_size: promised.2,
            refuses_unsigned_content_encoding: undeclared.0,
            refuses_unsigned_tagging: undeclared.1,
            refuses_unsigned_storage_class: undeclared.2,
            refuses_unsigned_checksum_algorithm: undeclared.3,
            refuses_unsigned_acl: undeclared.4,
            keeps_token: found.token.as_deref() == Some("honest"),
            returns_sha256_on_head: found.sha256 == digest.sha256(),
            answers_cors,
            versioned: found.version_id.is_some(),
            object_lock: self.is_kept,
        };
        self.learn(&found);
        Ok(seen)
    }

    async fn try_put(&mut self) -> Result<(), Error> {
        let digest = Digest::from(Sha256::of(BYTES));
        let (signer, answers) = self.way_in().await?;
        let found = match self.put_first(signer, &digest).await {
            // Something else may answer under the public name from here, where clients reach the store.
            Err(refused @ Error::Refused { .. }) if answers.is_some() => {
                let inside = self.put_first(&self.objects.0.inside, &digest).await;
                inside.map_err(|_| refused)?
            }
            put => put?,
        };
        self.learn(&found);
        Ok(())
    }

    /// The signer whose endpoint can be reached from here, and whether it answers browsers.
    async fn way_in(&self) -> Result<(&'a Signer, Option<bool>), Error> {
        Ok(match self.preflight(&self.place("honest")).await? {
            Some(answers) => (&self.objects.0.uploads, Some(answers)),
            None => (&self.objects.0.inside, None),
        })
    }

    /// The honest PUT. Where its object turns out to be locked, that one stays, and the keys are used that every trial of
    /// such a bucket uses.
    async fn put_first(&mut self, signer: &Signer, digest: &Digest) -> Result<Object, Error> {
        let found = self.put_honestly(signer, &self.place("honest"), digest).await?;
        let is_locked = found.undeclared.iter().any(|(name, _)| name == "x-amz-object-lock-mode");
        if self.is_kept || !is_locked {
            return Ok(found);
        }
        (self.is_kept, self.is_locked) = (true, true);
        KEPT.clone_into(&mut self.prefix);
        self.put_honestly(signer, &self.place("honest"), digest).await
    }

    fn learn(&self, honest: &Object) {
        match self.is_locked {
            true => self.objects.0.defaults.accept_any(self.bucket),
            false => self.objects.0.defaults.learn(self.bucket, &honest.undeclared),
        }
    }

    /// Asks as a browser would; none where nobody answers.
    async fn preflight(&self, place: &Place) -> Result<Option<bool>, Error> {
        let signed = self.objects.0.uploads.put(&promise(place, None), LIFE).await?;
        let url = signed.url.split('?').next().unwrap_or_default();
        let request = self
            .http
            .request(Method::OPTIONS, url)
            .header(ORIGIN, SOME_ORIGIN)
            .header(ACCESS_CONTROL_REQUEST_METHOD, "PUT")
            .header(ACCESS_CONTROL_REQUEST_HEADERS, SOME_HEADERS);
        let Ok(response) = request.send().await else { return Ok(None) };
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let origin = header(ACCESS_CONTROL_ALLOW_ORIGIN);
        let lists = |name, word: &str| {
            header(name).split(',').map(str::trim).any(|listed| listed == "*" || listed.eq_ignore_ascii_case(word))
        };
        Ok(Some(
            response.status().is_success()
                && (origin == "*" || origin == SOME_ORIGIN)
                && lists(ACCESS_CONTROL_ALLOW_METHODS, "PUT")
                && SOME_HEADERS.split(',').all(|name| lists(ACCESS_CONTROL_ALLOW_HEADERS, name)),
        ))
    }

    async fn put_honestly(&self, signer: &Signer, place: &Place, digest: &Digest) -> Result<Object, Error> {
        let wanted = Put { kms_key_id: self.kms_key_id, ..promise(place, Some(digest)) };
        let answer = self.ask(&signer.put(&wanted, LIFE).await?, BYTES, None).await?;
        // What an earlier trial put may be kept: then 412 says that the signature was found good.
        let is_there = self.is_kept && answer.status == StatusCode::PRECONDITION_FAILED;
        if !answer.status.is_success() && !is_there {
            return Err(answer.refusal(self.bucket));
        }
        let found = self.objects.head(place, None).await?;
        found.ok_or_else(|| Error::Refused {
            code: "NotFound".to_owned(),
            message: "a presigned PUT was answered 200, but the broker's endpoint has no such object".to_owned(),
        })
    }

    /// Whether a PUT that breaks its promise, or that adds headers, is refused and stores nothing.
    async fn refuses(
        &self,
        signer: &Signer,
        key: &str,
        digest: Option<&Digest>,
        bytes: &[u8],
        more: Option<(&str, &str)>,
    ) -> Result<bool, Error> {
        let place = self.place(key);
        if self.was_taken(&place).await? {
            return Ok(false);
        }
        let status = self.send(&signer.put(&promise(&place, digest), LIFE).await?, bytes, more).await?;
        Ok(!status.is_success() && self.objects.head(&place, None).await?.is_none())
    }

    /// Whether a header that was not signed makes a PUT fail, or is not kept.
    async fn drops(&self, signer: &Signer, key: &str, header: (&str, &str)) -> Result<bool, Error> {
        let place = self.place(key);
        if !self.was_taken(&place).await? {
            self.send(&signer.put(&promise(&place, None), LIFE).await?, BYTES, Some(header)).await?;
        }
        let found = self.objects.head(&place, None).await?;
        Ok(!found.is_some_and(|found| found.undeclared.iter().any(|(name, _)| name.starts_with(header.0))))
    }

    /// Whether a holder of a URL cannot open the object to everybody.
    async fn refuses_acl(&self, signer: &Signer, digest: &Digest) -> Result<bool, Error> {
        let place = self.place("acl");
        let signed = signer.put(&promise(&place, Some(digest)), LIFE).await?;
        if !self.was_taken(&place).await? {
            self.send(&signed, BYTES, Some(("x-amz-acl", "public-read"))).await?;
        }
        // Without a signature, as anybody asks.
        let answer = self.http.get(signed.url.split('?').next().unwrap_or_default()).send().await;
        let answer = answer.map_err(|error| Error::Unavailable(format!("an unsigned GET: {}", chain(&error.without_url()))))?;
        Ok(!answer.status().is_success())
    }

    /// Whether the store took this by mistake in an earlier trial, and its lock keeps it: then it is not asked again.
    async fn was_taken(&self, place: &Place) -> Result<bool, Error> {
        Ok(self.is_kept && self.objects.head(place, None).await?.is_some())
    }

    async fn refuses_overwrite(&self, signer: &Signer, place: &Place, digest: &Digest, found: &Object) -> Result<bool, Error> {
        let again = Put { token: "again", ..promise(place, Some(digest)) };
        let status = self.send(&signer.put(&again, LIFE).await?, BYTES, None).await?;
        Ok(!status.is_success() && self.objects.head(place, None).await?.as_ref() == Some(found))
    }

    async fn refuses_copy_part(&self, signer: &Signer, source: &Place) -> Result<bool, Error> {
        let place = self.place("copy-part");
        let id = self.objects.create_multipart(&promise(&place, None), false).await?;
        let signed = signer.part(&place, &id, 1, WRONG.len() as u64, None, LIFE).await?;
        let status = self.send(&signed, WRONG, Some(("x-amz-copy-source", &format!("/{source}")))).await?;
        let parts = self.objects.list_parts(&place, &id).await?.unwrap_or_default();
        Ok(!status.is_success() && parts.is_empty())
    }

    async fn send(&self, signed: &Signed, bytes: &[u8], more: Option<(&str, &str)>) -> Result<StatusCode, Error> {
        Ok(self.ask(signed, bytes, more).await?.status)
    }

    /// Sends what was signed, with other bytes or more headers if asked.
    async fn ask(&self, signed: &Signed, bytes: &[u8], more: Option<(&str, &str)>) -> Result<Answer, Error> {
        let mut request = self.http.put(&signed.url).body(bytes.to_vec());
        // The length follows from the body, as in a browser.
        let given = signed.headers.iter().filter(|(name, _)| *name != CONTENT_LENGTH.as_str());
        for (name, value) in given.map(|(name, value)| (name.as_str(), value.as_str())).chain(more) {
            request = request.header(name, value);
        }
        match request.send().await {
            Ok(response) => Ok(Answer::read(response).await),
            Err(error) => Err(Error::Unavailable(format!("a presigned PUT: {}", chain(&error.without_url())))),
        }
    }

    /// Cleans up, unless Object Lock keeps everything. Where the broker may not delete, nothing of what it was asked is
    /// wrong, but from then on the same keys are used, so that what stays does not grow.
    async fn end<T>(&self, outcome: Result<T, Error>) -> Result<T, Error> {
        let cleaned = within(CLEANING, self.clean()).await;
        // Whatever failed before fails the cleaning too, and is what matters.
        let found = outcome?;
        match cleaned {
            Err(error @ (Error::Refused { .. } | Error::Locked { .. })) => {
                self.stays(&error);
                Ok(found)
            }
            cleaned => cleaned.map(|()| found),
        }
    }

    /// Notes that what is written stays, so that the next trials use the same keys.
    fn stays(&self, error: &Error) {
        warn!(%error, "the probe's objects stay in bucket {}: {error}", self.bucket);
        match error {
            Error::Locked { .. } => self.objects.0.defaults.accept_any(self.bucket),
            _ => self.objects.0.defaults.keep(self.bucket),
        }
    }

    /// Removes what may be there, and goes on past a failure to the rest; gives the first one back.
    async fn clean(&self) -> Result<(), Error> {
        let mut outcome = self.objects.abort_uploads(&self.place("copy-part"), None).await.map(drop);
        for key in KEYS.into_iter().filter(|_| !self.is_kept) {
            let removed = self.objects.delete_versions(&self.place(key)).await.map(drop);
            outcome = outcome.and(removed);
        }
        outcome
    }

    fn place(&self, key: &str) -> Place {
        Place { bucket: self.bucket.to_owned(), key: format!("{}/{key}", self.prefix) }
    }
}

fn promise<'a>(place: &'a Place, digest: Option<&'a Digest>) -> Put<'a> {
    Put {
        place,
        token: "honest",
        content_type: "application/octet-stream",
        size_bytes: BYTES.len() as u64,
        digest,
        kms_key_id: None,
    }
}

async fn within<T>(time: Duration, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = || Error::Unavailable(format!("the store was not tried out in {} s", time.as_secs()));
    tokio::time::timeout(time, work).await.unwrap_or_else(|_| Err(late()))
}
