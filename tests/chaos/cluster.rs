//! The cluster of a run: where the programs are, how each server is set up and started, and which proxies are between them.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use serde_json::Value;

use crate::Failure;
use crate::plan::{Link, Target};
use crate::proxy::Proxies;
use crate::servers::{Probe, Server, ServerSpec, command};

pub(crate) const BUCKET: &str = "chaos";
pub(crate) const TOPICS: [&str; 2] = ["chaos-a", "chaos-b"];
pub(crate) const PARTITIONS: i32 = 3;
const ACCESS_KEY: &str = "minio-test";
const SECRET_KEY: &str = "minio-test-secret";

/// Short intervals, so that every timeout happens within a run. But a PUT may take longer than S3 is ever stopped, and
/// sessions are short enough that the end of the run does not wait for them.
const SETTINGS: [(&str, &str); 14] = [
    ("LFS_BROKER_AUTH_MODE", "none"),
    ("LFS_BROKER_TOPICS_DEFAULT_ENABLED", "true"),
    ("LFS_BROKER_LEASE_SECONDS", "3"),
    ("LFS_BROKER_SESSION_SECONDS", "20"),
    ("LFS_BROKER_SESSION_MAX_SECONDS", "40"),
    ("LFS_BROKER_URL_SECONDS", "8"),
    ("LFS_BROKER_SWEEP_SECONDS", "1"),
    ("LFS_BROKER_LONGEST_PUT_SECONDS", "20"),
    ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "2"),
    ("LFS_BROKER_PART_SIZE_BYTES", "5242880"),
    ("LFS_BROKER_SINGLE_PUT_MAX_BYTES", "5242880"),
    ("AWS_REGION", "us-east-1"),
    ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
    ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
];

/// The programs, at the paths that the CI scripts use.
struct Programs {
    kafka: String,
    minio: PathBuf,
    toxiproxy: PathBuf,
    postgres: PathBuf,
}

/// Every server of a run.
pub(crate) struct Cluster {
    pub(crate) dir: PathBuf,
    broker: PathBuf,
    /// Settings of the broker in addition to `SETTINGS`.
    extra_settings: &'static [(&'static str, &'static str)],
    pub(crate) replicas: Vec<Arc<Server>>,
    pub(crate) postgres: Arc<Server>,
    pub(crate) kafka: Arc<Server>,
    pub(crate) minio: Arc<Server>,
    pub(crate) proxies: Proxies,
    pub(crate) http: reqwest::Client,
    pub(crate) s3: aws_sdk_s3::Client,
    /// Direct access, without a proxy.
    pub(crate) database_url: String,
    /// Direct access, without a proxy.
    pub(crate) bootstrap: String,
    s3_endpoint: String,
    /// Toxiproxy is never killed.
    _toxiproxy: Server,
}

/// A free port outside of the range for outgoing connections, so that no other process takes it while its server is down.
fn port() -> Result<u16, Failure> {
    for _ in 0..1000 {
        let port = fastrand::u16(12_000..30_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(Failure("no port between 12000 and 30000 is free".into()))
}

async fn output(program: &str, arguments: &[&str]) -> Result<String, Failure> {
    let output = tokio::process::Command::new(program).args(arguments).output().await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(Failure(format!("{program} {arguments:?}: {}{}", text(&output.stdout), text(&output.stderr)))),
    }
}

async fn programs() -> Result<Programs, Failure> {
    let versions = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/versions.sh").display().to_string();
    let query = ". \"$0\" && printf '%s\\n' \"$KAFKA_HOME\" \"$MINIO_HOME\" \"$TOXIPROXY_HOME\" && postgres_bin";
    let output = output("bash", &["-c", query, &versions]).await?;
    let [kafka, minio, toxiproxy, postgres] = output.lines().collect::<Vec<_>>()[..] else {
        return Err(Failure(format!("{versions} does not print four paths: {output}")));
    };
    for home in [kafka, minio, toxiproxy] {
        if !Path::new(home).is_dir() {
            return Err(Failure(format!("{home} is missing: run `bash .ci/tools.sh kafka minio toxiproxy`")));
        }
    }
    Ok(Programs {
        kafka: format!("{kafka}/*"),
        minio: Path::new(minio).join("minio"),
        toxiproxy: Path::new(toxiproxy).join("server"),
        postgres: Path::new(postgres).to_owned(),
    })
}

impl Cluster {
    /// Sets up every server in `dir` and starts it.
    pub(crate) async fn start(
        dir: &Path,
        replicas: usize,
        broker: PathBuf,
        extra_settings: &'static [(&'static str, &'static str)],
    ) -> Result<Self, Failure> {
        let http = reqwest::Client::builder().no_proxy().build().map_err(|error| Failure(error.to_string()))?;
        let programs = programs().await?;
        let toxiproxy_port = port()?;
        let toxiproxy = toxiproxy(&programs, dir, toxiproxy_port, &http);
        let (postgres, database_port) = postgres(&programs, dir, &http).await?;
        let (minio, minio_port) = minio(&programs, dir, &http)?;
        let database_url = format!("postgres://lfs@127.0.0.1:{database_port}/postgres");
        tokio::try_join!(toxiproxy.start_until_ready(), postgres.start_until_ready(), minio.start_until_ready())?;

        let mut proxies = Proxies::at(toxiproxy_port, http.clone());
        let (mut kafka_ports, mut http_ports) = (Vec::new(), Vec::new());
        for number in 0..replicas {
            let (kafka_port, listen) = (port()?, port()?);
            proxies.create(Link::Postgres(number), port()?, database_port).await?;
            proxies.create(Link::S3(number), port()?, minio_port).await?;
            proxies.create(Link::Kafka(number), port()?, kafka_port).await?;
            proxies.create(Link::Http(number), port()?, listen).await?;
            kafka_ports.push(kafka_port);
            http_ports.push(listen);
        }
        proxies.create(Link::Bytes, port()?, minio_port).await?;
        let (kafka, bootstrap) = kafka(&programs, dir, &http, &kafka_ports, &proxies).await?;
        let s3_endpoint = format!("http://127.0.0.1:{minio_port}");
        let mut cluster = Self {
            dir: dir.to_owned(),
            broker,
            extra_settings,
            replicas: Vec::new(),
            postgres: Arc::new(postgres),
            kafka: Arc::new(kafka),
            minio: Arc::new(minio),
            proxies,
            s3: s3_client(&s3_endpoint),
            http,
            database_url,
            bootstrap,
            s3_endpoint,
            _toxiproxy: toxiproxy,
        };
        cluster.prepare().await?;
        for (number, listen) in http_ports.into_iter().enumerate() {
            let replica = cluster.replica(number, listen);
            replica.start_until_ready().await?;
            cluster.replicas.push(Arc::new(replica));
        }
        Ok(cluster)
    }

    /// Creates what must exist before the first broker starts: the schema, the bucket and the topics.
    async fn prepare(&self) -> Result<(), Failure> {
        self.broker(&["migrate"]).await?;
        self.s3.create_bucket().bucket(BUCKET).send().await.map_err(|error| Failure(format!("create bucket: {error:?}")))?;
        self.kafka.start_until_ready().await?;
        let admin: AdminClient<DefaultClientContext> =
            rdkafka::ClientConfig::new().set("bootstrap.servers", &self.bootstrap).create()?;
        let topics = TOPICS.map(|topic| NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1)));
        let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(60)));
        for created in admin.create_topics(&topics, &options).await? {
            created.map_err(|(topic, code)| Failure(format!("topic {topic}: {code}")))?;
        }
        Ok(())
    }

    fn replica(&self, number: usize, listen: u16) -> Server {
        let mut environment: BTreeMap<String, String> =
            SETTINGS.iter().chain(self.extra_settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let address = |link| self.proxies.address(link);
        let extra_settings = [
            ("LFS_BROKER_LISTEN", format!("127.0.0.1:{listen}")),
            ("DATABASE_URL", format!("postgres://lfs@{}/postgres", address(Link::Postgres(number)))),
            ("KAFKA_BOOTSTRAP_SERVERS", address(Link::Kafka(number))),
            ("AWS_ENDPOINT_URL_S3", format!("http://{}", address(Link::S3(number)))),
            ("LFS_BROKER_S3_BUCKET", BUCKET.to_owned()),
            ("LFS_BROKER_S3_PUBLIC_ENDPOINT", format!("http://{}", address(Link::Bytes))),
            ("RUST_BACKTRACE", "1".to_owned()),
        ];
        environment.extend(extra_settings.map(|(name, value)| (name.to_owned(), value)));
        let spec = ServerSpec {
            name: format!("replica-{number}"),
            program: self.broker.clone(),
            arguments: vec!["serve".into()],
            environment,
            user: Vec::new(),
            probe: Probe::Http(format!("http://127.0.0.1:{listen}/healthz")),
            log: self.dir.join(format!("replica-{number}.log")),
        };
        Server::new(spec, self.http.clone())
    }

    /// Runs a command of the broker without the proxies and returns its output.
    pub(crate) async fn broker(&self, arguments: &[&str]) -> Result<String, Failure> {
        let output = self.run(arguments).await?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(printed),
            false => {
                let stderr = String::from_utf8_lossy(&output.stderr);
                Err(Failure(format!("lfs-broker {arguments:?}: {}: {printed}{stderr}", output.status)))
            }
        }
    }

    /// The report of `audit`, with or without findings.
    pub(crate) async fn audit(&self, options: &[&str]) -> Result<Value, Failure> {
        let arguments = [&["audit", "--json"], options].concat();
        let output = self.run(&arguments).await?;
        serde_json::from_slice(&output.stdout).map_err(|error| {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Failure(format!("lfs-broker {arguments:?}: {}: {error}: {stderr}", output.status))
        })
    }

    async fn run(&self, arguments: &[&str]) -> Result<std::process::Output, Failure> {
        let mut command = command(&self.broker, &[]);
        command.args(arguments).envs(SETTINGS).envs(self.extra_settings.iter().copied()).kill_on_drop(true);
        command.env("DATABASE_URL", &self.database_url).env("KAFKA_BOOTSTRAP_SERVERS", &self.bootstrap);
        command.env("AWS_ENDPOINT_URL_S3", &self.s3_endpoint).env("LFS_BROKER_S3_BUCKET", BUCKET);
        let result = tokio::time::timeout(Duration::from_secs(600), command.output());
        Ok(result.await.map_err(|_| Failure(format!("lfs-broker {arguments:?} did not exit within 600 s")))??)
    }

    /// The servers of a target.
    pub(crate) fn servers(&self, target: Target) -> Vec<Arc<Server>> {
        match target {
            Target::Replica(number) => vec![Arc::clone(&self.replicas[number])],
            Target::Replicas => self.replicas.clone(),
            Target::Postgres | Target::Backend => vec![Arc::clone(&self.postgres)],
            Target::Kafka => vec![Arc::clone(&self.kafka)],
            Target::Minio => vec![Arc::clone(&self.minio)],
            Target::Everything => {
                let servers = [&self.postgres, &self.kafka, &self.minio];
                self.replicas.iter().chain(servers).map(Arc::clone).collect()
            }
        }
    }
}

fn s3_client(endpoint: &str) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "chaos"));
    aws_sdk_s3::Client::from_conf(config.build())
}

fn toxiproxy(programs: &Programs, dir: &Path, port: u16, http: &reqwest::Client) -> Server {
    let spec = ServerSpec {
        name: "toxiproxy".into(),
        program: programs.toxiproxy.clone(),
        arguments: vec!["-host".into(), "127.0.0.1".into(), "-port".into(), port.to_string()],
        environment: BTreeMap::new(),
        user: Vec::new(),
        probe: Probe::Http(format!("http://127.0.0.1:{port}/version")),
        log: dir.join("toxiproxy.log"),
    };
    Server::new(spec, http.clone())
}

/// PostgreSQL refuses to run as root, so as root it runs as another user.
async fn postgres(programs: &Programs, dir: &Path, http: &reqwest::Client) -> Result<(Server, u16), Failure> {
    let home = dir.join("postgres");
    std::fs::create_dir(&home)?;
    let (data, home_name) = (home.join("data").display().to_string(), home.display().to_string());
    let mut user = Vec::new();
    if output("id", &["-u"]).await? == "0" {
        let owner = if output("id", &["-u", "postgres"]).await.is_ok() { "postgres" } else { "nobody" };
        let group = output("id", &["-g", owner]).await?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))?;
        output("chown", &[owner, &home_name]).await?;
        user = vec![format!("--reuid={owner}"), format!("--regid={group}"), "--clear-groups".into()];
    }
    let mut initdb = command(&programs.postgres.join("initdb"), &user);
    initdb.args(["-D", &data, "-U", "lfs", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]).current_dir(&home);
    let created = initdb.output().await?;
    if !created.status.success() {
        return Err(Failure(format!("initdb: {}", String::from_utf8_lossy(&created.stderr))));
    }
    let port = port()?;
    let mut arguments = vec!["-D".to_owned(), data];
    // Without fsync a killed process loses nothing, because its writes are in the page cache. But a kill can tear a write
    // between two memory pages, so full-page writes stay on.
    let settings = ["listen_addresses=127.0.0.1", "fsync=off", "max_connections=200"].map(str::to_owned);
    for setting in settings.into_iter().chain([format!("port={port}"), format!("unix_socket_directories={home_name}")]) {
        arguments.extend(["-c".to_owned(), setting]);
    }
    let spec = ServerSpec {
        name: "postgres".into(),
        program: programs.postgres.join("postgres"),
        arguments,
        environment: BTreeMap::new(),
        user,
        probe: Probe::Postgres(format!("postgres://lfs@127.0.0.1:{port}/postgres")),
        log: dir.join("postgres.log"),
    };
    Ok((Server::new(spec, http.clone()), port))
}

fn minio(programs: &Programs, dir: &Path, http: &reqwest::Client) -> Result<(Server, u16), Failure> {
    let port = port()?;
    let data = dir.join("minio");
    std::fs::create_dir(&data)?;
    let environment =
        [("MINIO_ROOT_USER", ACCESS_KEY), ("MINIO_ROOT_PASSWORD", SECRET_KEY), ("MINIO_BROWSER", "off"), ("MINIO_UPDATE", "off")];
    let spec = ServerSpec {
        name: "minio".into(),
        program: programs.minio.clone(),
        arguments: vec!["server".into(), "--address".into(), format!("127.0.0.1:{port}"), data.display().to_string()],
        environment: environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        user: Vec::new(),
        probe: Probe::Http(format!("http://127.0.0.1:{port}/minio/health/ready")),
        log: dir.join("minio.log"),
    };
    Ok((Server::new(spec, http.clone()), port))
}

/// One node that is broker and controller. Each replica has a listener that advertises the replica's proxy, and the test
/// has one of its own. A short session timeout lets a killed node register again soon.
async fn kafka(
    programs: &Programs,
    dir: &Path,
    http: &reqwest::Client,
    ports: &[u16],
    proxies: &Proxies,
) -> Result<(Server, String), Failure> {
    let (direct, controller_port) = (port()?, port()?);
    let home = dir.join("kafka");
    std::fs::create_dir(&home)?;
    let (mut listeners, mut advertised, mut protocols) = (String::new(), String::new(), String::new());
    for (number, port) in ports.iter().enumerate() {
        listeners += &format!(",REPLICA{number}://127.0.0.1:{port}");
        advertised += &format!(",REPLICA{number}://{}", proxies.address(Link::Kafka(number)));
        protocols += &format!(",REPLICA{number}:PLAINTEXT");
    }
    let properties = format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller_port}\n\
         controller.listener.names=CONTROLLER\ninter.broker.listener.name=DIRECT\n\
         listeners=DIRECT://127.0.0.1:{direct},CONTROLLER://127.0.0.1:{controller_port}{listeners}\n\
         advertised.listeners=DIRECT://127.0.0.1:{direct}{advertised}\n\
         listener.security.protocol.map=DIRECT:PLAINTEXT,CONTROLLER:PLAINTEXT{protocols}\n\
         log.dirs={}\nauto.create.topics.enable=false\noffsets.topic.replication.factor=1\noffsets.topic.num.partitions=4\n\
         transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\ntransaction.state.log.num.partitions=4\n\
         share.coordinator.state.topic.replication.factor=1\nshare.coordinator.state.topic.min.isr=1\n\
         broker.session.timeout.ms=2000\nbroker.heartbeat.interval.ms=500\n",
        home.join("log").display()
    );
    let config = home.join("server.properties").display().to_string();
    std::fs::write(&config, properties)?;
    let java = ["-Xmx320m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dlog4j2.level=INFO", "-cp", &programs.kafka];
    let format = ["kafka.tools.StorageTool", "format", "-t", "AAAAAAAAAAAAAAAAAAAAAQ", "-c", &config];
    output("java", &[&java[..], &format].concat()).await?;
    let arguments = java.iter().copied().chain(["kafka.Kafka", &config]).map(str::to_owned);
    let spec = ServerSpec {
        name: "kafka".into(),
        program: "java".into(),
        arguments: arguments.collect(),
        environment: BTreeMap::new(),
        user: Vec::new(),
        probe: Probe::Tcp(direct),
        log: dir.join("kafka.log"),
    };
    Ok((Server::new(spec, http.clone()), format!("127.0.0.1:{direct}")))
}
