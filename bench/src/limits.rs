//! The limits: what the servers behind the broker can do without it. Each line compares the broker with one of them.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use sqlx::{PgConnection, query};
use tokio::process::Command;

use crate::Failure;
use crate::clients::Payload;
use crate::http::HttpClient;
use crate::kafka::Transactions;
use crate::load::Work;
use crate::s3::{Bucket, sha256_base64};
use crate::servers::{Servers, TOPIC, execute, output};

/// The database of the limits, so that the broker's tables and statistics do not contain them.
const DATABASE: &str = "limits";
const INSERT: &str = "insert into one_row (payload) values (1)";

/// Creates the table of the one-row inserts, and the script for pgbench.
pub(crate) async fn create_tables(servers: &Servers) -> Result<(), Failure> {
    execute(&mut servers.database("postgres").await?, &format!("create database {DATABASE}")).await?;
    let table = "create table one_row (id bigint generated always as identity primary key, payload bigint not null)";
    execute(&mut servers.database(DATABASE).await?, table).await?;
    Ok(std::fs::write(servers.dir.join("insert.sql"), format!("{INSERT};\n"))?)
}

/// One-row inserts per second, each in its own transaction, by pgbench. pgbench counts whole seconds.
pub(crate) async fn pgbench_inserts(servers: &Servers, clients: usize, duration: Duration) -> Result<f64, Failure> {
    let mut command = Command::new(servers.postgres_bin.join("pgbench"));
    let (clients_text, seconds) = (clients.to_string(), duration.as_secs().max(1).to_string());
    // More threads than the two that the load of the broker has would not be comparable.
    let threads = clients.min(2).to_string();
    command.args(["--no-vacuum", "--protocol=prepared", "--client", &clients_text, "--jobs", &threads, "--time", &seconds]);
    command.arg("--file").arg(servers.dir.join("insert.sql")).arg(servers.database_url(DATABASE));
    let printed = output(&mut command).await?;
    let rate = printed.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rate.ok_or_else(|| Failure(format!("pgbench printed no tps: {printed}")))
}

/// PUTs small objects straight into S3: the same request as the broker signs, without the broker.
pub(crate) struct DirectPuts {
    pub(crate) http: HttpClient,
    pub(crate) bucket: Bucket,
    pub(crate) bytes: Bytes,
    sha256_base64: String,
}

impl DirectPuts {
    /// One client.
    pub(crate) fn new(servers: &Servers, payload: &Payload) -> Self {
        let (http, bucket, bytes) = (HttpClient::default(), servers.bucket.clone(), payload.bytes.clone());
        Self { http, bucket, sha256_base64: sha256_base64(&bytes), bytes }
    }

    /// PUTs an object under this key.
    pub(crate) async fn put(&mut self, key: &str) -> Result<(), Failure> {
        self.bucket.put(&mut self.http, key, &self.bytes, &self.sha256_base64).await
    }
}

impl Work for DirectPuts {
    async fn once(&mut self) -> Result<(), Failure> {
        self.put(&new_key()).await
    }
}

/// The key of a new object.
pub(crate) fn new_key() -> String {
    format!("direct/{:032x}", fastrand::u128(..))
}

/// HEADs one object in S3.
pub(crate) struct Heads {
    pub(crate) http: HttpClient,
    pub(crate) bucket: Bucket,
    pub(crate) key: String,
}

impl Heads {
    /// Clients of one new object.
    pub(crate) async fn clients(servers: &Servers, payload: &Payload, clients: usize) -> Result<Vec<Self>, Failure> {
        let key = new_key();
        DirectPuts::new(servers, payload).put(&key).await?;
        let client = |_| Self { http: HttpClient::default(), bucket: servers.bucket.clone(), key: key.clone() };
        Ok((0..clients).map(client).collect())
    }
}

impl Work for Heads {
    async fn once(&mut self) -> Result<(), Failure> {
        self.bucket.head(&mut self.http, &self.key).await
    }
}

/// What a complete cannot do without: one HEAD, a commit, a Kafka transaction of one record, and another commit.
pub(crate) struct BareCompletes {
    head: Heads,
    database: PgConnection,
    transactions: Transactions,
}

impl BareCompletes {
    /// Clients, each with its own connections and its own producer.
    pub(crate) async fn clients(servers: &Servers, payload: &Payload, clients: usize) -> Result<Vec<Self>, Failure> {
        let heads = Heads::clients(servers, payload, clients).await?.into_iter().enumerate();
        // Initialising a producer takes long, so all are initialised at the same time.
        let starting = heads.map(|(number, head)| async move {
            let database = servers.database(DATABASE).await?;
            let transactions = Transactions::start(&servers.bootstrap, format!("bench-{clients}-{number}")).await?;
            Ok::<_, Failure>(Self { head, database, transactions })
        });
        try_join_all(starting).await
    }
}

impl Work for BareCompletes {
    async fn once(&mut self) -> Result<(), Failure> {
        self.head.once().await?;
        query(INSERT).execute(&mut self.database).await?;
        // A pointer has about as many bytes.
        self.transactions.run(TOPIC, &[b'x'; 300]).await?;
        query(INSERT).execute(&mut self.database).await?;
        Ok(())
    }
}
