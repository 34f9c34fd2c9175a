//! The complete system on one machine, started and stopped by one command: a real PostgreSQL, an S3 server that checks
//! signatures and checksums, an embedded Kafka, and the broker.
//!
//! The servers are in the crate `lfs-broker-embedded`. This module starts and stops them together with the broker.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lfs_broker_embedded::{kafka, postgres, s3};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::app::{self, Running};
use crate::kafka::Delivery;
use crate::store::{self, Store};
use crate::{auth, broker, completion, http, notify, objects, policy, relay, sweeper};

/// The bucket of `dev`.
const BUCKET: &str = "lfs-dev";
const REGION: &str = "us-east-1";

/// How long `dev` waits for a real Kafka. A Kafka that starts at the same time answers within seconds.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(15);
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The directories that a run creates in its data directory. PostgreSQL removes its own.
const DATA_DIRS: [&str; 4] = ["s3/buckets", "s3/content", "s3/uploads", "s3/new"];
const STATE_FILES: [&str; 8] = ["s3/lock", "s3.json", "s3.new", "kafka.json", "kafka.new", "dev.json", "dev.new", "lock"];

/// Settings of `dev`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the API listens.
    pub listen: SocketAddr,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Whether the data is removed when the program ends.
    pub ephemeral: bool,
    /// The bootstrap servers of a real Kafka, which replaces the embedded one.
    pub kafka: Option<String>,
    /// Origins whose pages may call the API. When empty, none.
    pub cors_origins: Vec<String>,
}

/// Why `dev` does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the data directory cannot be read or written.
    #[error("{0}: {1}")]
    File(PathBuf, std::io::Error),
    /// The path of the data directory is a file.
    #[error("{0} is a file, not a directory")]
    NotADirectory(PathBuf),
    /// Another `dev` uses the same data directory.
    #[error("another lfs-broker dev runs on {0}")]
    AlreadyRunning(PathBuf),
    /// The real Kafka does not answer.
    #[error("no kafka at {bootstrap_servers} after {} s: {reason}", KAFKA_TIMEOUT.as_secs())]
    NoKafka {
        /// Its bootstrap servers.
        bootstrap_servers: String,
        /// The error of the last attempt.
        reason: crate::kafka::Error,
    },
    /// PostgreSQL did not start or stop.
    #[error("{0}")]
    Postgres(#[from] postgres::Error),
    /// The embedded S3 failed.
    #[error("{0}")]
    S3(#[from] s3::Error),
    /// The embedded Kafka failed.
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    /// The database failed.
    #[error("{0}")]
    Store(#[from] store::Error),
    /// The broker did not start.
    #[error("{0}")]
    App(#[from] app::Error),
}

/// The addresses and credentials of all servers. They are written to `dev.json` once all servers answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Endpoints {
    /// The URL of the API.
    pub broker_url: String,
    /// The endpoint of S3.
    pub s3_endpoint: String,
    /// The region of S3.
    pub s3_region: String,
    /// The access key of S3.
    pub s3_access_key_id: String,
    /// The secret access key of S3.
    pub s3_secret_access_key: String,
    /// The bucket.
    pub bucket: String,
    /// The bootstrap servers of Kafka.
    pub kafka_bootstrap: String,
    /// The URL of the database in PostgreSQL.
    pub database_url: String,
    /// The directory of PostgreSQL's files. It is outside the data directory if this process runs as root and PostgreSQL's
    /// user cannot enter the data directory.
    pub postgres_dir: PathBuf,
}

/// The properties of the S3 server that a restart must keep, because signed URLs and clients depend on them. In `s3.json`.
#[derive(Serialize, Deserialize)]
struct SavedS3 {
    s3_port: u16,
    access_key_id: String,
    secret_access_key: String,
}

/// The properties of the embedded Kafka that a restart must keep, because clients connect to it again. In `kafka.json`.
#[derive(Serialize, Deserialize)]
struct SavedKafka {
    port: u16,
}

/// All running servers.
pub struct Dev {
    endpoints: Endpoints,
    broker: Running,
    kafka: Option<kafka::Server>,
    infrastructure: Infrastructure,
}

/// The servers that the broker depends on, and the files of the run.
struct Infrastructure {
    dir: PathBuf,
    ephemeral: bool,
    s3: S3,
    postgres: postgres::Server,
    _lock: std::fs::File,
}

/// Starts all servers. The broker answers when this function returns. Returns `None` if `shutdown` completed first.
///
/// # Errors
/// Which server did not start, and why. Then no server keeps running, and ephemeral data is removed.
pub async fn start(settings: Settings, shutdown: impl Future<Output = ()>) -> Result<Option<Dev>, Error> {
    // Checked first, before any file is created that would have to be removed.
    if !settings.listen.ip().is_loopback() {
        return Err(app::Error::NoAuthOnPublicAddress(settings.listen).into());
    }
    let mut shutdown = pin!(shutdown);
    let Some(infrastructure) = Infrastructure::start(&settings, shutdown.as_mut()).await? else { return Ok(None) };
    let result = tokio::select! {
        result = start_on(&settings, &infrastructure) => result.map(Some),
        () = shutdown => Ok(None),
    };
    match result {
        Ok(Some((endpoints, broker, kafka))) => Ok(Some(Dev { endpoints, broker, kafka, infrastructure })),
        Ok(None) => infrastructure.stop().await.map(|()| None),
        Err(error) => {
            infrastructure.stop().await?;
            Err(error)
        }
    }
}

async fn start_on(
    settings: &Settings,
    infrastructure: &Infrastructure,
) -> Result<(Endpoints, Running, Option<kafka::Server>), Error> {
    let Infrastructure { dir, s3, postgres, .. } = infrastructure;
    let store_settings = store::Settings::new(&postgres.url());
    let store = Store::connect(&store_settings)?;
    store.migrate().await?;
    let kafka = match &settings.kafka {
        Some(_) => None,
        None => Some(start_kafka(dir, &store).await?),
    };
    let bootstrap = kafka.as_ref().map(kafka::Server::bootstrap_servers).or_else(|| settings.kafka.clone()).unwrap_or_default();
    let app = app_settings(settings, store_settings, s3, bootstrap.clone(), kafka.is_some());
    if kafka.is_none() {
        info!("connecting to kafka at {bootstrap}, for up to {} s", KAFKA_TIMEOUT.as_secs());
    }
    wait_for_kafka(&app.kafka).await?;
    let broker = app::start_on(app, store).await?;
    let endpoints = Endpoints {
        broker_url: format!("http://{}", broker.address()),
        s3_endpoint: s3.server.endpoint(),
        s3_region: REGION.to_owned(),
        s3_access_key_id: s3.saved.access_key_id.clone(),
        s3_secret_access_key: s3.saved.secret_access_key.clone(),
        bucket: BUCKET.to_owned(),
        kafka_bootstrap: bootstrap,
        database_url: postgres.url(),
        postgres_dir: postgres.data_dir().to_owned(),
    };
    write_private_json(&dir.join("dev.json"), &endpoints)?;
    Ok((endpoints, broker, kafka))
}

/// Returns once Kafka answers. The broker starts without Kafka too, but `dev` is ready only when all servers answer.
async fn wait_for_kafka(settings: &crate::kafka::Settings) -> Result<(), Error> {
    let kafka = crate::kafka::Kafka::connect(settings).map_err(app::Error::from)?;
    let deadline = Instant::now() + KAFKA_TIMEOUT;
    loop {
        match kafka.reachable().await {
            Ok(()) => return Ok(()),
            Err(reason) if Instant::now() > deadline => {
                return Err(Error::NoKafka { bootstrap_servers: settings.bootstrap_servers.clone(), reason });
            }
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

impl Infrastructure {
    /// Starts the servers. If `shutdown` completes first, they are stopped, and the result is `None`.
    async fn start(settings: &Settings, shutdown: Pin<&mut impl Future<Output = ()>>) -> Result<Option<Self>, Error> {
        let dir = settings.data_dir.clone();
        if dir.is_file() {
            return Err(Error::NotADirectory(dir));
        }
        std::fs::create_dir_all(&dir).map_err(|error| Error::File(dir.clone(), error))?;
        let dir = dir.canonicalize().map_err(|error| Error::File(dir.clone(), error))?;
        let lock = lock(&dir)?;
        // A killed run leaves `dev.json`. The file must exist only while the servers run.
        remove(std::fs::remove_file, dir.join("dev.json"))?;
        let ephemeral = settings.ephemeral;
        // Data of an earlier run is not removed if the servers do not start.
        let is_new = !dir.join("s3.json").exists();
        // Checked before the servers start, because the broker listens last.
        if let Err(error) = std::net::TcpListener::bind(settings.listen) {
            if is_new {
                remove(std::fs::remove_file, dir.join("lock"))?;
                remove(std::fs::remove_dir, dir)?;
            }
            return Err(app::Error::Listen(settings.listen, error).into());
        }
        let postgres = postgres::Settings { ephemeral, ..postgres::Settings::new(dir.join("postgres")) };
        let postgres = match postgres::Server::start_unless(&postgres, shutdown).await {
            Ok(Some(postgres)) => postgres,
            Ok(None) => {
                if ephemeral {
                    remove_data(&dir)?;
                }
                return Ok(None);
            }
            Err(error) => {
                if ephemeral && is_new {
                    remove_data(&dir)?;
                }
                return Err(error.into());
            }
        };
        match start_s3(&dir).await {
            Ok(s3) => Ok(Some(Self { dir, ephemeral, s3, postgres, _lock: lock })),
            Err(error) => {
                postgres.stop().await?;
                if ephemeral {
                    remove_data(&dir)?;
                }
                Err(error)
            }
        }
    }

    async fn stop(self) -> Result<(), Error> {
        self.s3.server.stop().await;
        self.postgres.stop().await?;
        if self.ephemeral { remove_data(&self.dir) } else { Ok(()) }
    }
}

impl Dev {
    /// The addresses and credentials of all servers.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// The directory of `dev.json` and the data.
    pub fn data_dir(&self) -> &Path {
        &self.infrastructure.dir
    }

    /// Whether this `dev` runs the embedded Kafka.
    pub fn has_embedded_kafka(&self) -> bool {
        self.kafka.is_some()
    }

    /// Stops all servers in order, the broker first.
    ///
    /// # Errors
    /// When PostgreSQL does not stop in time.
    pub async fn stop(self) -> Result<(), Error> {
        remove(std::fs::remove_file, self.infrastructure.dir.join("dev.json"))?;
        self.broker.stop().await;
        if let Some(kafka) = self.kafka {
            kafka.stop();
        }
        self.infrastructure.stop().await
    }
}

/// Removes the files of `dev` from a data directory, and the directory itself if it is then empty. Other files in the
/// directory are kept.
fn remove_data(dir: &Path) -> Result<(), Error> {
    for name in DATA_DIRS {
        remove(std::fs::remove_dir_all, dir.join(name))?;
    }
    for name in STATE_FILES {
        remove(std::fs::remove_file, dir.join(name))?;
    }
    for directory in [dir.join("s3"), dir.join("postgres"), dir.to_owned()] {
        remove(std::fs::remove_dir, directory)?;
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
            access_key_id: Some(s3.saved.access_key_id.clone()),
            secret_access_key: Some(s3.saved.secret_access_key.clone()),
            ..objects::Settings::default()
        },
        kafka: crate::kafka::Settings {
            bootstrap_servers: bootstrap,
            properties: BTreeMap::new(),
            // The embedded Kafka accepts transactions without their guarantees, so `dev` does not use them.
            delivery: if embedded { Delivery::AtLeastOnce } else { Delivery::ExactlyOnce },
            create_topics: true,
        },
        http: http::Settings {
            allowed_hosts: Some(http::AllowedHosts { hosts: Vec::new(), origins: settings.cors_origins.clone() }),
            ..http::Settings::default()
        },
        auth: auth::Settings { mode: auth::Mode::None, ..auth::Settings::default() },
        policy: policy::Settings { default_enabled: true, ..policy::Settings::default() },
        broker: broker::Settings::default(),
        completion: completion::Settings::default(),
        sweeper: sweeper::Settings::default(),
        notify: notify::Settings::default(),
    }
}

/// Only one `dev` may use a data directory. The lock is released when the process ends, even if it is killed.
fn lock(dir: &Path) -> Result<std::fs::File, Error> {
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| Error::File(path, error))?;
    file.try_lock().map_err(|_| Error::AlreadyRunning(dir.to_owned()))?;
    Ok(file)
}

/// Whether a `dev` may run on this data directory. It holds the lock while it runs, and its kill releases the lock.
pub(crate) fn may_run(dir: &Path) -> bool {
    // Without a lock file, another program wrote the directory, so nothing is known.
    !std::fs::File::open(dir.join("lock")).is_ok_and(|file| file.try_lock_shared().is_ok())
}

struct S3 {
    server: s3::Server,
    saved: SavedS3,
}

async fn start_s3(dir: &Path) -> Result<S3, Error> {
    let path = dir.join("s3.json");
    let saved = read_json(&path).unwrap_or_else(|| SavedS3 {
        s3_port: 0,
        access_key_id: format!("dev{}", random_text(9)),
        secret_access_key: random_text(30),
    });
    let settings = |port| s3::Settings {
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        root: dir.join("s3"),
        access_key_id: saved.access_key_id.clone(),
        secret_access_key: saved.secret_access_key.clone(),
    };
    // Reusing the port keeps URLs valid that were signed before a restart.
    let server = match s3::Server::start(settings(saved.s3_port)).await {
        Err(error @ s3::Error::Listen { .. }) if saved.s3_port != 0 => {
            warn!("{error}; S3 listens on another port, and URLs that were signed before no longer work");
            s3::Server::start(settings(0)).await?
        }
        result => result?,
    };
    server.create_bucket(BUCKET).await?;
    let saved = SavedS3 { s3_port: server.address().port(), ..saved };
    write_private_json(&path, &saved)?;
    Ok(S3 { server, saved })
}

/// Random text from the operating system's randomness.
fn random_text(bytes: usize) -> String {
    let mut random = Vec::with_capacity(bytes + 16);
    while random.len() < bytes {
        random.extend_from_slice(uuid::Uuid::new_v4().as_bytes());
    }
    URL_SAFE_NO_PAD.encode(&random[..bytes]).replace(['-', '_'], "x")
}

/// Starts an embedded Kafka and restores the published records from the session table, because its memory is lost at
/// every stop.
async fn start_kafka(dir: &Path, store: &Store) -> Result<kafka::Server, Error> {
    let path = dir.join("kafka.json");
    let last_port = read_json::<SavedKafka>(&path).map_or(0, |saved| saved.port);
    // Reusing the port lets running consumers connect again after a restart.
    let server = match kafka::Server::start_on_port(last_port).await {
        Err(error @ kafka::Error::Listen { .. }) if last_port != 0 => {
            warn!("{error}; Kafka listens on another port, and clients that were started before must be restarted");
            kafka::Server::start_on_port(0).await?
        }
        result => result?,
    };
    if let Some(port) = server.port() {
        write_private_json(&path, &SavedKafka { port })?;
    }
    // The broker cannot create topics in the embedded Kafka, and every batch sends a marker, so the marker topic is
    // created here.
    server.create_topic(crate::kafka::MARKER_TOPIC, store.deployment().await?.shards).await?;
    let mut topics: BTreeMap<(String, i32), Vec<kafka::SavedRecord>> = BTreeMap::new();
    for (published, row) in store.published_records().await? {
        let record = relay::to_kafka_record(&row);
        let (key, value, headers) = (record.key, record.value, record.headers);
        let (offset, timestamp_ms) = (published.offset, published.timestamp_ms);
        let saved = kafka::SavedRecord { offset, timestamp_ms, key, value, headers };
        topics.entry((row.topic, published.partition)).or_default().push(saved);
    }
    for ((topic, partition), records) in topics {
        server.create_topic(&topic, kafka::NEW_TOPIC_PARTITIONS.max(partition + 1)).await?;
        server.restore(&topic, partition, records).await?;
    }
    Ok(server)
}

/// The content of a JSON file, or `None` if the file is missing or damaged. Then the caller uses defaults.
fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Writes JSON atomically, readable only by its owner, because it contains credentials.
fn write_private_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let failed = |error| Error::File(path.to_owned(), error);
    let temporary = path.with_extension("new");
    let mut file =
        std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary).map_err(failed)?;
    serde_json::to_writer_pretty(&mut file, value).map_err(|error| failed(error.into()))?;
    file.sync_all().map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}
