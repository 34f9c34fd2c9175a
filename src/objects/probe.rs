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
use uuid::Uuid;

use super::sign::Signer;
use super::{Error, Objects, Place, Put, Signed, chain};
use crate::session::Object;

/// What the probe promises and sends.
const BYTES: &[u8] = b"hello";
/// As long, and not what was promised.
const WRONG: &[u8] = b"jello";
/// A life long enough for one request.
const LIFE: Duration = Duration::from_secs(60);
/// One request of five bytes; longer means that the way is blocked.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A public endpoint that takes longer to connect is out of the broker's reach.
const CONNECT: Duration = Duration::from_secs(3);
/// The longest trial: what was there before then belongs to one that has ended.
pub const LONGEST_TRIAL: Duration = Duration::from_secs(60);
/// Where trials are made.
const TRIALS: &str = ".lfs-broker-probe/";
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
    /// HEAD shows the metadata that was signed into the PUT.
    pub keeps_token: bool,
    /// HEAD shows the SHA-256 of the whole.
    pub returns_sha256_on_head: bool,
    /// A browser on another origin may PUT to the public endpoint; none where the broker cannot reach that endpoint.
    pub answers_cors: Option<bool>,
    /// The bucket keeps versions.
    pub versioned: bool,
}

impl Capabilities {
    /// Whether the holder of an upload URL cannot copy what its signer may read.
    pub fn refuses_copy_source(&self) -> bool {
        self.refuses_unsigned_copy_source_put && self.refuses_unsigned_copy_source_part
    }
}

impl Objects {
    /// Tries the store out: a dozen small requests under `.lfs-broker-probe/`, removed again whatever happens.
    ///
    /// # Errors
    /// Where not even an honest PUT works, or the store stops to answer.
    pub async fn probe(&self, bucket: &str) -> Result<Capabilities, Error> {
        let http = Client::builder().connect_timeout(CONNECT).timeout(TIMEOUT).redirect(redirect::Policy::none()).build();
        let prefix = format!("{TRIALS}{}", Uuid::new_v4());
        let trial = Trial { objects: self, http: http.map_err(|error| Error::Settings(chain(&error)))?, bucket, prefix };
        let late = || Error::Unavailable(format!("the store was not tried out in {} s", LONGEST_TRIAL.as_secs()));
        let seen = tokio::time::timeout(LONGEST_TRIAL, trial.run()).await.unwrap_or_else(|_| Err(late()));
        let cleaned = tokio::time::timeout(CLEANING, trial.clean()).await;
        let seen = seen?;
        match cleaned {
            Ok(cleaned) => cleaned.map(|()| seen),
            Err(_) => Err(Error::Unavailable(format!("the probe's objects were not removed in {} s", CLEANING.as_secs()))),
        }
    }

    /// Removes what trials have left whose broker died, or whose store went away, in the middle: what is there now and
    /// still there when every trial that runs now has ended, which is after [`LONGEST_TRIAL`]. Returns when nothing is left.
    ///
    /// # Errors
    /// Where S3 does not answer; asking again goes on.
    pub async fn clean_after_trials(&self, bucket: &str, after: Duration) -> Result<(), Error> {
        loop {
            let left = self.list(bucket, TRIALS, None).await?;
            let prefixes: BTreeSet<String> =
                left.items.iter().filter_map(|object| Some(object.key.rsplit_once('/')?.0.to_owned())).collect();
            if prefixes.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(after).await;
            for prefix in prefixes {
                Trial { objects: self, http: Client::new(), bucket, prefix }.clean().await?;
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
}

/// The last pieces of the keys; what is written is removed by this list. What is written first goes last: as long as
/// anything is left of a trial, that is.
const KEYS: [&str; 5] = ["copy-part", "copy", "other-size", "wrong-bytes", "honest"];

impl Trial<'_> {
    async fn run(&self) -> Result<Capabilities, Error> {
        let honest = self.place("honest");
        let digest = Digest::from(Sha256::of(BYTES));

        let (signer, answers_cors) = match self.preflight(&honest).await? {
            Some(answers) => (&self.objects.0.uploads, Some(answers)),
            None => (&self.objects.0.inside, None),
        };
        let found = self.put_honestly(signer, &honest, &digest).await?;

        Ok(Capabilities {
            refuses_wrong_bytes: self.refuses_wrong_bytes(signer, &digest).await?,
            refuses_overwrite: self.refuses_overwrite(signer, &honest, &digest, &found).await?,
            refuses_unsigned_copy_source_put: self.refuses_copy(signer, &honest).await?,
            refuses_unsigned_copy_source_part: self.refuses_copy_part(signer, &honest).await?,
            refuses_other_size: self.refuses_other_size(signer).await?,
            keeps_token: found.token.as_deref() == Some("honest"),
            returns_sha256_on_head: found.sha256 == digest.sha256(),
            answers_cors,
            versioned: found.version_id.is_some(),
        })
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
        let status = self.send(&signer.put(&promise(place, Some(digest)), LIFE).await?, BYTES, None).await?;
        if !status.is_success() {
            let message = format!("a presigned PUT that keeps every promise was answered {status}");
            return Err(match status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED {
                true => Error::Unavailable(message),
                false => Error::Refused { code: format!("http-{}", status.as_u16()), message },
            });
        }
        let found = self.objects.head(place, None).await?;
        found.ok_or_else(|| Error::Refused {
            code: "NotFound".to_owned(),
            message: "a presigned PUT was answered 200, but the broker's endpoint has no such object".to_owned(),
        })
    }

    async fn refuses_wrong_bytes(&self, signer: &Signer, digest: &Digest) -> Result<bool, Error> {
        let place = self.place("wrong-bytes");
        let status = self.send(&signer.put(&promise(&place, Some(digest)), LIFE).await?, WRONG, None).await?;
        Ok(!status.is_success() && self.objects.head(&place, None).await?.is_none())
    }

    async fn refuses_overwrite(&self, signer: &Signer, place: &Place, digest: &Digest, found: &Object) -> Result<bool, Error> {
        let again = Put { token: "again", ..promise(place, Some(digest)) };
        let status = self.send(&signer.put(&again, LIFE).await?, BYTES, None).await?;
        Ok(!status.is_success() && self.objects.head(place, None).await?.as_ref() == Some(found))
    }

    async fn refuses_copy(&self, signer: &Signer, source: &Place) -> Result<bool, Error> {
        let place = self.place("copy");
        // Without a checksum: one that did not match the copied bytes would hide the hole.
        let status = self.send(&signer.put(&promise(&place, None), LIFE).await?, WRONG, Some(source)).await?;
        Ok(!status.is_success() && self.objects.head(&place, None).await?.is_none())
    }

    async fn refuses_copy_part(&self, signer: &Signer, source: &Place) -> Result<bool, Error> {
        let place = self.place("copy-part");
        let id = self.objects.create_multipart(&promise(&place, None), false).await?;
        let signed = signer.part(&place, &id, 1, WRONG.len() as u64, None, LIFE).await?;
        let status = self.send(&signed, WRONG, Some(source)).await?;
        let parts = self.objects.list_parts(&place, &id).await?.unwrap_or_default();
        Ok(!status.is_success() && parts.is_empty())
    }

    async fn refuses_other_size(&self, signer: &Signer) -> Result<bool, Error> {
        let place = self.place("other-size");
        let longer = [BYTES, BYTES].concat();
        let status = self.send(&signer.put(&promise(&place, None), LIFE).await?, &longer, None).await?;
        Ok(!status.is_success() && self.objects.head(&place, None).await?.is_none())
    }

    /// Sends what was signed, with other bytes or one header more if asked.
    async fn send(&self, signed: &Signed, bytes: &[u8], copy_source: Option<&Place>) -> Result<StatusCode, Error> {
        let mut request = self.http.put(&signed.url).body(bytes.to_vec());
        // The length follows from the body, as in a browser.
        for (name, value) in signed.headers.iter().filter(|(name, _)| *name != CONTENT_LENGTH.as_str()) {
            request = request.header(name, value);
        }
        if let Some(source) = copy_source {
            request = request.header("x-amz-copy-source", format!("/{source}"));
        }
        match request.send().await {
            Ok(response) => Ok(response.status()),
            Err(error) => Err(Error::Unavailable(format!("a presigned PUT: {}", chain(&error.without_url())))),
        }
    }

    /// Removes what may be there, and goes on past a failure to the rest; gives the first one back.
    async fn clean(&self) -> Result<(), Error> {
        let mut outcome = self.objects.abort_uploads(&self.place("copy-part"), None).await.map(drop);
        for key in KEYS {
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
