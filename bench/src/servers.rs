//! The servers of a run. `.ci/bench` starts PostgreSQL, Kafka and MinIO and describes them in the environment. This module
//! creates databases, topics and the bucket on them, and issues tokens.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, query_scalar, raw_sql};
use tokio::process::Command;

use crate::Failure;
use crate::kafka;
use crate::s3::Bucket;

/// The topic of all uploads.
pub(crate) const TOPIC: &str = "bench";
/// Its partitions.
pub(crate) const PARTITIONS: i32 = 4;
/// How many tenants have a token. The first one makes the uploads of lines with one tenant.
pub(crate) const TENANTS: usize = 16;
const BUCKET: &str = "bench";
const REGION: &str = "us-east-1";
/// The longest time of a command of the broker, of PostgreSQL or of the scripts.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);

/// The settings of every broker in a run: tokens as in production, and limits that no line reaches. The quotas are checked,
/// but never exceeded.
const SETTINGS: [(&str, &str); 10] = [
    ("LFS_BROKER_AUTH_MODE", "jwt"),
    ("LFS_BROKER_JWT_HS256_SECRET", "a secret of the benchmark, which has 32 bytes or more"),
    ("LFS_BROKER_JWT_ISSUER", "bench"),
    ("LFS_BROKER_JWT_AUDIENCE", "bench"),
    ("LFS_BROKER_TOPICS_DEFAULT_ENABLED", "true"),
    ("LFS_BROKER_TENANT_OPEN_SESSIONS", "1000000000"),
    ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "1000000000"),
    // MinIO accepts an unsigned copy source, and the run has one credential only.
    ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", "true"),
    ("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "0"),
    ("AWS_REGION", REGION),
];

/// Where the servers and the programs are.
pub(crate) struct Servers {
    /// The directory with the data, the logs and the pid files of the servers.
    pub(crate) dir: PathBuf,
    pub(crate) broker_program: PathBuf,
    pub(crate) postgres_bin: PathBuf,
    pub(crate) bootstrap: String,
    pub(crate) bucket: Bucket,
    /// One token for each tenant.
    pub(crate) tokens: Arc<[String]>,
    /// The script that stops and starts a server.
    neighbours: PathBuf,
    database_url: String,
    s3: S3Access,
}

/// How programs other than the broker reach S3.
#[derive(Clone)]
pub(crate) struct S3Access {
    pub(crate) endpoint: String,
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: String,
}

fn variable(name: &str) -> Result<String, Failure> {
    std::env::var(name).map_err(|_| Failure(format!("{name} is not set: start the benchmark with .ci/bench")))
}

/// Runs a command and returns its standard output.
pub(crate) async fn output(command: &mut Command) -> Result<String, Failure> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let shown = command.as_std().get_program().to_string_lossy().into_owned();
    let output = tokio::time::timeout(COMMAND_TIMEOUT, command.output()).await;
    let output = output.map_err(|_| Failure(format!("{shown} did not exit within {} s", COMMAND_TIMEOUT.as_secs())))?;
    let output = output.map_err(|error| Failure(format!("{shown}: {error}")))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(stdout),
        false => Err(Failure(format!("{shown}: {}: {stdout}{}", output.status, String::from_utf8_lossy(&output.stderr)))),
    }
}

impl Servers {
    /// Reads the environment, and creates the bucket, the topic and the tokens.
    pub(crate) async fn connect() -> Result<Self, Failure> {
        let s3 = S3Access {
            endpoint: variable("LFS_TEST_S3_ENDPOINT")?,
            access_key_id: variable("LFS_TEST_S3_ACCESS_KEY_ID")?,
            secret_access_key: variable("LFS_TEST_S3_SECRET_ACCESS_KEY")?,
        };
        let mut servers = Self {
            dir: variable("NEIGHBOURS")?.into(),
            broker_program: variable("LFS_BENCH_BROKER")?.into(),
            postgres_bin: variable("LFS_BENCH_POSTGRES_BIN")?.into(),
            bootstrap: variable("LFS_TEST_KAFKA")?,
            bucket: Bucket::new(&s3.endpoint, BUCKET, &s3.access_key_id, &s3.secret_access_key),
            tokens: Arc::default(),
            neighbours: Path::new(env!("CARGO_MANIFEST_DIR")).join("../.ci/neighbours.sh"),
            database_url: variable("LFS_TEST_DATABASE_URL")?,
            s3,
        };
        // Without the module there is nothing to switch off, and the line `counts` reports that.
        let _ = servers.track_statements(false).await;
        servers.bucket.create().await?;
        kafka::create_topic(&servers.bootstrap, TOPIC, PARTITIONS).await?;
        let mut tokens = Vec::new();
        for tenant in 0..TENANTS {
            tokens.push(servers.token(tenant).await?);
        }
        servers.tokens = tokens.into();
        Ok(servers)
    }

    async fn token(&self, tenant: usize) -> Result<String, Failure> {
        let tenant = tenant_name(tenant);
        let mut command = self.broker("postgres", &[]);
        command.args(["token", "--tenant", &tenant, "--scope", "lfs:write lfs:read", "--topic", "*", "--ttl", "1d"]);
        Ok(output(&mut command).await?.trim().to_owned())
    }

    /// The URL of a database.
    pub(crate) fn database_url(&self, database: &str) -> String {
        let (server, _) = self.database_url.rsplit_once('/').unwrap_or((&self.database_url, ""));
        format!("{server}/{database}")
    }

    /// Connects to a database.
    pub(crate) async fn database(&self, database: &str) -> Result<PgConnection, Failure> {
        Ok(PgConnection::connect(&self.database_url(database)).await?)
    }

    /// Creates a database with the broker's schema.
    pub(crate) async fn create_database(&self, database: &str) -> Result<(), Failure> {
        execute(&mut self.database("postgres").await?, &format!("create database {database}")).await?;
        output(self.broker(database, &[]).arg("migrate")).await.map(drop)
    }

    /// Switches PostgreSQL's counting of statements. It costs time, so it is on only while statements are counted.
    pub(crate) async fn track_statements(&self, is_on: bool) -> Result<(), Failure> {
        self.configure_postgres("pg_stat_statements.track", if is_on { "top" } else { "none" }).await
    }

    /// Changes a setting of PostgreSQL for all connections.
    pub(crate) async fn configure_postgres(&self, name: &str, value: &str) -> Result<(), Failure> {
        let mut database = self.database("postgres").await?;
        execute(&mut database, &format!("alter system set {name} = '{value}'")).await?;
        execute(&mut database, "select pg_reload_conf()").await?;
        // The server processes read the setting before their next statement, but the signal takes a moment.
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(())
    }

    /// How many bytes PostgreSQL has written to its log so far, of all databases.
    pub(crate) async fn wal_bytes(&self) -> Result<f64, Failure> {
        let position = "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8";
        Ok(query_scalar(position).fetch_one(&mut self.database("postgres").await?).await?)
    }

    /// A command of the broker on this database. The kernel kills it if this process ends first.
    pub(crate) fn broker(&self, database: &str, settings: &[(&str, &str)]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.broker_program).kill_on_drop(true);
        for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env("DATABASE_URL", self.database_url(database)).env("KAFKA_BOOTSTRAP_SERVERS", &self.bootstrap);
        command.env("LFS_BROKER_S3_BUCKET", BUCKET).envs(self.s3_variables()).envs(SETTINGS);
        command.envs(settings.iter().copied());
        command
    }

    /// The variables by which programs of AWS reach S3.
    pub(crate) fn s3_variables(&self) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL_S3", self.s3.endpoint.clone()),
            ("AWS_ACCESS_KEY_ID", self.s3.access_key_id.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.s3.secret_access_key.clone()),
            ("AWS_DEFAULT_REGION", REGION.to_owned()),
        ]
    }

    /// The access to S3 and the name of the bucket.
    pub(crate) fn s3(&self) -> (&S3Access, &'static str) {
        (&self.s3, BUCKET)
    }

    /// Stops a server, or starts it again on its data: `stop` or `start`. Returns when it is stopped or ready.
    pub(crate) async fn control(&self, verb: &str, server: &str) -> Result<(), Failure> {
        output(Command::new("bash").arg(&self.neighbours).arg(verb).arg(&self.dir).arg(server)).await.map(drop)
    }
}

/// The name of a tenant.
pub(crate) fn tenant_name(number: usize) -> String {
    format!("tenant-{number}")
}

/// Runs statements without parameters.
pub(crate) async fn execute(connection: &mut PgConnection, statements: &str) -> Result<(), Failure> {
    raw_sql(AssertSqlSafe(statements)).execute(connection).await?;
    Ok(())
}
