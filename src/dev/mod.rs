//! The whole product on one machine: a real PostgreSQL, an S3 server that checks signatures and checksums, and a
//! broker that speaks Kafka, all started and ended by one command.

pub mod kafka;
pub mod postgres;
pub mod s3;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use crate::app::{self, Running};
use crate::kafka::Delivery;
use crate::store::{self, Store};
use crate::{auth, broker, finish, http, objects, policy, relay, sweeper};

/// The bucket of `dev`.
const BUCKET: &str = "lfs-dev";
const REGION: &str = "us-east-1";
/// Partitions of a topic that was never seen before.
const PARTITIONS: i32 = 4;

/// A real Kafka that is started beside `dev` answers within seconds; one that does not is not there.
const KAFKA_WITHIN: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What a run makes in its data directory; PostgreSQL removes its own.
const DATA: [&str; 4] = ["s3/buckets", "s3/content", "s3/uploads", "s3/new"];
const FILES: [&str; 6] = ["s3/lock", "s3.json", "s3.new", "dev.json", "dev.new", "lock"];

/// What `dev` can be told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the API listens.
    pub listen: SocketAddr,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Whether the data goes when the program ends.
    pub ephemeral: bool,
    /// A real Kafka instead of the embedded one.
    pub kafka: Option<String>,
    /// Origins whose pages may call the API; none when empty.
    pub cors_origins: Vec<String>,
}

/// Why `dev` does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the data directory.
    #[error("{0}: {1}")]
    File(PathBuf, std::io::Error),
    /// Somebody else runs on the same data.
    #[error("another lfs-broker dev runs on {0}")]
    Taken(PathBuf),
    /// The real Kafka does not answer.
    #[error("no kafka at {place}, for {} s: {reason}", KAFKA_WITHIN.as_secs())]
    NoKafka {
        /// Where it should be.
        place: String,
        /// What it died of at the last try.
        reason: crate::kafka::Error,
    },
    /// PostgreSQL.
    #[error("{0}")]
    Postgres(#[from] postgres::Error),
    /// The embedded S3.
    #[error("{0}")]
    S3(#[from] s3::Error),
    /// The embedded Kafka.
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    /// The database.
    #[error("{0}")]
    Store(#[from] store::Error),
    /// The broker.
    #[error("{0}")]
    App(#[from] app::Error),
}

/// Where everything is; written as `dev.json` once everything answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Places {
    /// The API.
    pub broker_url: String,
    /// S3.
    pub s3_endpoint: String,
    /// Its region.
    pub s3_region: String,
    /// Its access key.
    pub s3_access_key_id: String,
    /// Its secret.
    pub s3_secret_access_key: String,
    /// The bucket.
    pub bucket: String,
    /// Kafka.
    pub kafka_bootstrap: String,
    /// PostgreSQL.
    pub database_url: String,
}

/// What outlives a restart beside the data: addresses that signed URLs and clients hold on to.
#[derive(Serialize, Deserialize)]
struct Kept {
    s3_port: u16,
    access_key_id: String,
    secret_access_key: String,
}

/// Everything that runs.
pub struct Dev {
    places: Places,
    broker: Running,
    kafka: Option<kafka::Server>,
    ground: Ground,
}

/// What the rest stands on, and all that keeps files.
struct Ground {
    dir: PathBuf,
    ephemeral: bool,
    s3: S3,
    postgres: postgres::Server,
    _lock: std::fs::File,
}

/// Starts every part; the broker answers when this returns. `None` where `ending` came first.
///
/// # Errors
/// What could not be started, and why. Nothing goes on running then, and what was ephemeral is gone.
pub async fn start(settings: Settings, ending: impl Future<Output = ()>) -> Result<Option<Dev>, Error> {
    // Before anything is made that would have to be removed again.
    if !settings.listen.ip().is_loopback() {
        return Err(app::Error::OpenToTheWorld(settings.listen).into());
    }
    let mut ending = pin!(ending);
    let mut starting = pin!(Ground::start(&settings));
    let (ground, is_ended) = tokio::select! {
        // Signals are waited for before the first file is made.
        biased;
        // It is not dropped half-way: nobody else would end what it has started, and remove what it has made.
        () = &mut ending => (starting.as_mut().await, true),
        ground = &mut starting => (ground, false),
    };
    let ground = match ground {
        Ok(ground) => ground,
        // Ctrl-C in a terminal ends the programs that make the data as well.
        Err(_) if is_ended => return Ok(None),
        Err(error) => return Err(error),
    };
    let started = match is_ended {
        true => Ok(None),
        false => tokio::select! {
            started = start_on(&settings, &ground) => started.map(Some),
            () = ending => Ok(None),
        },
    };
    match started {
        Ok(Some((places, broker, kafka))) => Ok(Some(Dev { places, broker, kafka, ground })),
        Ok(None) => ground.stop().await.map(|()| None),
        Err(error) => {
            ground.stop().await?;
            Err(error)
        }
    }
}

async fn start_on(settings: &Settings, ground: &Ground) -> Result<(Places, Running, Option<kafka::Server>), Error> {
    let Ground { dir, s3, postgres, .. } = ground;
    let store_settings = store::Settings::new(&postgres.url());
    let store = Store::connect(&store_settings)?;
    store.migrate().await?;
    let kafka = match &settings.kafka {
        Some(_) => None,
        None => Some(start_kafka(&store).await?),
    };
    let bootstrap = kafka.as_ref().map(kafka::Server::bootstrap_servers).or_else(|| settings.kafka.clone()).unwrap_or_default();
    let app = app_settings(settings, store_settings, s3, bootstrap.clone(), kafka.is_some());
    await_kafka(&app.kafka).await?;
    let broker = app::start_on(app, store).await?;
    let places = Places {
        broker_url: format!("http://{}", broker.address()),
        s3_endpoint: s3.server.endpoint(),
        s3_region: REGION.to_owned(),
        s3_access_key_id: s3.kept.access_key_id.clone(),
        s3_secret_access_key: s3.kept.secret_access_key.clone(),
        bucket: BUCKET.to_owned(),
        kafka_bootstrap: bootstrap,
        database_url: postgres.url(),
    };
    write_secret(&dir.join("dev.json"), &places)?;
    Ok((places, broker, kafka))
}

/// Returns once Kafka answers: the broker itself starts without it, and `dev` that is ready has all its parts.
async fn await_kafka(settings: &crate::kafka::Settings) -> Result<(), Error> {
    let kafka = crate::kafka::Kafka::connect(settings).map_err(app::Error::from)?;
    let deadline = Instant::now() + KAFKA_WITHIN;
    loop {
        match kafka.reachable().await {
            Ok(()) => return Ok(()),
            Err(reason) if Instant::now() > deadline => {
                return Err(Error::NoKafka { place: settings.bootstrap_servers.clone(), reason });
            }
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}

impl Ground {
    async fn start(settings: &Settings) -> Result<Self, Error> {
        let dir = settings.data_dir.clone();
        std::fs::create_dir_all(&dir).map_err(|error| Error::File(dir.clone(), error))?;
        let dir = dir.canonicalize().map_err(|error| Error::File(dir.clone(), error))?;
        let lock = lock(&dir)?;
        // A killed run has left it; it says what runs.
        remove(std::fs::remove_file, dir.join("dev.json"))?;
        let ephemeral = settings.ephemeral;
        // Data of before stays as long as nothing ran on it.
        let is_fresh = !dir.join("s3.json").exists();
        let postgres = postgres::Settings { ephemeral, ..postgres::Settings::new(dir.join("postgres")) };
        let postgres = match postgres::Server::start(&postgres).await {
            Ok(postgres) => postgres,
            Err(error) => {
                if ephemeral && is_fresh {
                    remove_made(&dir)?;
                }
                return Err(error.into());
            }
        };
        match start_s3(&dir).await {
            Ok(s3) => Ok(Self { dir, ephemeral, s3, postgres, _lock: lock }),
            Err(error) => {
                postgres.stop().await?;
                if ephemeral {
                    remove_made(&dir)?;
                }
                Err(error)
            }
        }
    }

    async fn stop(self) -> Result<(), Error> {
        self.s3.server.stop().await;
        self.postgres.stop().await?;
        if self.ephemeral { remove_made(&self.dir) } else { Ok(()) }
    }
}

impl Dev {
    /// Where everything is.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Where `dev.json` and the data are.
    pub fn data_dir(&self) -> &Path {
        &self.ground.dir
    }

    /// Whether Kafka is the embedded one.
    pub fn has_embedded_kafka(&self) -> bool {
        self.kafka.is_some()
    }

    /// Ends every part in order, the broker first.
    ///
    /// # Errors
    /// When PostgreSQL does not end in time.
    pub async fn stop(self) -> Result<(), Error> {
        remove(std::fs::remove_file, self.ground.dir.join("dev.json"))?;
        self.broker.stop().await;
        if let Some(kafka) = self.kafka {
            kafka.stop();
        }
        self.ground.stop().await
    }
}

/// Removes what runs have made in a data directory, and the directory itself where that was all. Whoever names a
/// directory that holds something else keeps it.
fn remove_made(dir: &Path) -> Result<(), Error> {
    for name in DATA {
        remove(std::fs::remove_dir_all, dir.join(name))?;
    }
    for name in FILES {
        remove(std::fs::remove_file, dir.join(name))?;
    }
    for emptied in [dir.join("s3"), dir.join("postgres"), dir.to_owned()] {
        remove(std::fs::remove_dir, emptied)?;
    }
    Ok(())
}

fn remove(removal: impl Fn(PathBuf) -> std::io::Result<()>, path: PathBuf) -> Result<(), Error> {
    match removal(path.clone()) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {
            Err(Error::File(path, error))
        }
        _ => Ok(()),
    }
}

fn app_settings(settings: &Settings, store: store::Settings, s3: &S3, bootstrap: String, embedded: bool) -> app::Settings {
    app::Settings {
        listen: settings.listen,
        public_url: None,
        cors_origins: settings.cors_origins.clone(),
        store,
        objects: objects::Settings {
            bucket: Some(BUCKET.to_owned()),
            endpoint: Some(s3.server.endpoint()),
            region: Some(REGION.to_owned()),
            access_key_id: Some(s3.kept.access_key_id.clone()),
            secret_access_key: Some(s3.kept.secret_access_key.clone()),
            ..objects::Settings::default()
        },
        kafka: crate::kafka::Settings {
            bootstrap_servers: bootstrap,
            properties: BTreeMap::new(),
            // The embedded broker takes transactions without their meaning: none is better than a false one.
            delivery: if embedded { Delivery::AtLeastOnce } else { Delivery::ExactlyOnce },
            create_topics: true,
        },
        http: http::Settings {
            local: Some(http::Local { hosts: Vec::new(), origins: settings.cors_origins.clone() }),
            ..http::Settings::default()
        },
        auth: auth::Settings { mode: auth::Mode::None, ..auth::Settings::default() },
        policy: policy::Settings { default_enabled: true, ..policy::Settings::default() },
        broker: broker::Settings::default(),
        finish: finish::Settings::default(),
        sweeper: sweeper::Settings::default(),
    }
}

/// One `dev` a data directory: the lock goes with the process, however it ends.
fn lock(dir: &Path) -> Result<std::fs::File, Error> {
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| Error::File(path, error))?;
    file.try_lock().map_err(|_| Error::Taken(dir.to_owned()))?;
    Ok(file)
}

struct S3 {
    server: s3::Server,
    kept: Kept,
}

async fn start_s3(dir: &Path) -> Result<S3, Error> {
    let path = dir.join("s3.json");
    let known = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
    let kept =
        known.unwrap_or_else(|| Kept { s3_port: 0, access_key_id: format!("dev{}", random(9)), secret_access_key: random(30) });
    let settings = |port| s3::Settings {
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        root: dir.join("s3"),
        access_key_id: kept.access_key_id.clone(),
        secret_access_key: kept.secret_access_key.clone(),
    };
    // URLs signed before a restart stay good as long as the port does.
    let server = match s3::Server::start(settings(kept.s3_port)).await {
        Err(_) if kept.s3_port != 0 => s3::Server::start(settings(0)).await?,
        started => started?,
    };
    server.create_bucket(BUCKET).await?;
    let kept = Kept { s3_port: server.address().port(), ..kept };
    write_secret(&path, &kept)?;
    Ok(S3 { server, kept })
}

/// Text that nobody guesses, from the operating system's randomness.
fn random(bytes: usize) -> String {
    let mut random = Vec::with_capacity(bytes + 16);
    while random.len() < bytes {
        random.extend_from_slice(uuid::Uuid::new_v4().as_bytes());
    }
    URL_SAFE_NO_PAD.encode(&random[..bytes]).replace(['-', '_'], "x")
}

/// An embedded Kafka that holds what was published before: it forgets at every end, the session table does not.
async fn start_kafka(store: &Store) -> Result<kafka::Server, Error> {
    let server = kafka::Server::start()?;
    // It cannot be asked for a topic by an administrator, and markers are sent with every batch.
    server.create_topic(crate::kafka::MARKER_TOPIC, store.deployment().await?.shards).await?;
    let mut topics: BTreeMap<(String, i32), Vec<kafka::Kept>> = BTreeMap::new();
    for (placed, waiting) in store.published_records().await? {
        let timestamp_ms = i64::try_from(placed.at.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
        let kept = kafka::Kept { offset: placed.offset, timestamp_ms, record: relay::record(&waiting) };
        topics.entry((waiting.topic, placed.partition)).or_default().push(kept);
    }
    for ((topic, partition), records) in topics {
        server.create_topic(&topic, PARTITIONS.max(partition + 1)).await?;
        server.restore(&topic, partition, records).await?;
    }
    Ok(server)
}

/// Writes JSON that only the owner may read: it holds credentials. Whole or not at all.
fn write_secret<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let failed = |error| Error::File(path.to_owned(), error);
    let fresh = path.with_extension("new");
    let mut file =
        std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh).map_err(failed)?;
    serde_json::to_writer_pretty(&mut file, value).map_err(|error| failed(error.into()))?;
    file.sync_all().map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)
}
