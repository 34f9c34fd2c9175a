//! The servers behind every `TestBroker`: embedded ones, started once per process, or real servers named by variables.
//!
//! `LFS_TEST_DATABASE_URL` (a superuser's), `LFS_TEST_KAFKA` (host:port), `LFS_TEST_S3_ENDPOINT` with
//! `LFS_TEST_S3_ACCESS_KEY_ID`, `LFS_TEST_S3_SECRET_ACCESS_KEY` and `LFS_TEST_S3_FLAVOUR` (`minio`, `versitygw`).

use std::env::var;
use std::sync::OnceLock;

use lfs_broker::store;
use lfs_broker_embedded::{kafka, postgres};
use sqlx::{Connection as _, Executor as _, PgConnection};
use uuid::Uuid;

use crate::s3_server::S3Server;

/// The servers that all test brokers share.
pub(crate) struct Servers {
    admin_url: String,
    template: String,
    pub(crate) s3: &'static S3Server,
    pub(crate) kafka: String,
    /// Whether Kafka is a real one, which has transactions.
    pub(crate) real_kafka: bool,
    // A drop would stop these servers; they must run until the process exits.
    _postgres: Option<postgres::Server>,
    _kafka: Option<kafka::Server>,
    _files: tempfile::TempDir,
}

static SERVERS: OnceLock<Servers> = OnceLock::new();

/// The servers. The first call starts them on a runtime that outlives every test's own runtime.
pub(crate) fn servers() -> &'static Servers {
    SERVERS.get_or_init(|| {
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                send.send(start().await).unwrap();
                std::future::pending::<()>().await;
            });
        });
        receive.recv().expect("the servers start")
    })
}

async fn start() -> Servers {
    let files = tempfile::tempdir().unwrap();
    let (admin_url, postgres) = match var("LFS_TEST_DATABASE_URL") {
        Ok(url) => (url, None),
        Err(_) => {
            let settings =
                postgres::Settings { fsync: false, ephemeral: true, ..postgres::Settings::new(files.path().join("postgres")) };
            let server = postgres::Server::start(&settings).await.expect("the embedded PostgreSQL starts");
            (server.admin_url(), Some(server))
        }
    };
    let template = create_template(&admin_url).await;
    let (kafka, real_kafka, kafka_server) = match var("LFS_TEST_KAFKA") {
        Ok(bootstrap) => (bootstrap, true, None),
        Err(_) => {
            let server = kafka::Server::start().expect("the embedded Kafka starts");
            // `dev` does the same: the embedded Kafka creates no topic through the admin API. A deployment has four shards.
            server.create_topic(lfs_broker::kafka::MARKER_TOPIC, 4).await.expect("the embedded Kafka creates a topic");
            (server.bootstrap_servers(), false, Some(server))
        }
    };
    Servers {
        admin_url,
        template,
        s3: S3Server::for_tests(),
        kafka,
        real_kafka,
        _postgres: postgres,
        _kafka: kafka_server,
        _files: files,
    }
}

fn url_of(admin_url: &str, database: &str) -> String {
    let (server, _) = admin_url.rsplit_once('/').expect("a database URL names a database");
    format!("{server}/{database}")
}

/// Migrates one template database. Each test copies it, which is much faster than migrating again.
async fn create_template(admin_url: &str) -> String {
    let template = format!("lfs_template_{}", Uuid::new_v4().simple());
    create_database(admin_url, &template, "template1").await;
    let store = store::Store::connect(&store::Settings::new(&url_of(admin_url, &template))).unwrap();
    store.migrate().await.expect("the migrations run");
    // PostgreSQL copies a template only while it has no connection.
    store.close().await;
    template
}

async fn create_database(admin_url: &str, name: &str, template: &str) {
    let mut admin = PgConnection::connect(admin_url).await.expect("PostgreSQL answers");
    // PostgreSQL refuses two copies of one template at a time; the lock makes them wait for each other.
    admin.execute("select pg_advisory_lock(20261121)").await.unwrap();
    let create = format!("create database {name} template {template}");
    admin.execute(sqlx::AssertSqlSafe(create)).await.expect("a database is made");
    admin.close().await.unwrap();
}

impl Servers {
    /// What no response may contain: the servers' addresses and the S3 secret.
    pub(crate) fn secrets(&self) -> [String; 4] {
        let address = |url: &str| url.rsplit('@').next().unwrap_or_default().split('/').next().unwrap_or_default().to_owned();
        let s3 = self.s3.endpoint.trim_start_matches("http://").to_owned();
        [s3, self.s3.secret_access_key.clone(), self.kafka.clone(), address(&self.admin_url)]
    }

    /// A fresh database with the current schema.
    pub(crate) async fn database(&self) -> String {
        let name = format!("lfs_{}", Uuid::new_v4().simple());
        create_database(&self.admin_url, &name, &self.template).await;
        let url = url_of(&self.admin_url, &name);
        // A copy is a deployment of its own: two with one identity would fence each other and read each other's markers.
        let mut database = PgConnection::connect(&url).await.expect("PostgreSQL answers");
        database.execute("update deployment set id = gen_random_uuid()").await.expect("the copy gets an identity");
        database.close().await.unwrap();
        url
    }
}

/// Creates a topic: in the embedded Kafka by its own method, in a real Kafka through the admin API.
pub(crate) async fn create_topic(topic: &str, partitions: i32) {
    use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
    use rdkafka::client::DefaultClientContext;
    let servers = servers();
    if let Some(embedded) = &servers._kafka {
        return embedded.create_topic(topic, partitions).await.expect("the embedded Kafka creates a topic");
    }
    let admin: AdminClient<DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &servers.kafka).create().expect("an admin client is created");
    let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    let outcome = admin.create_topics(&[new], &AdminOptions::new()).await.expect("Kafka answers");
    outcome[0].as_ref().expect("the topic is created");
}

/// Deletes a topic of a real Kafka. The embedded Kafka cannot delete topics.
pub(crate) async fn delete_topic(topic: &str) {
    use rdkafka::admin::{AdminClient, AdminOptions};
    use rdkafka::client::DefaultClientContext;
    let admin: AdminClient<DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).create().expect("an admin client is created");
    let outcome = admin.delete_topics(&[topic], &AdminOptions::new()).await.expect("Kafka answers");
    outcome[0].as_ref().expect("the topic is deleted");
}

/// Changes a topic's configuration in a real Kafka.
pub(crate) async fn set_config(topic: &str, entries: &[(&str, &str)]) {
    use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
    use rdkafka::client::DefaultClientContext;
    let admin: AdminClient<DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).create().expect("an admin client is created");
    let config = AlterConfig::new(ResourceSpecifier::Topic(topic));
    let config = entries.iter().fold(config, |config, (key, value)| config.set(key, value));
    let outcome = admin.alter_configs([&config], &AdminOptions::new()).await.expect("Kafka answers");
    outcome[0].as_ref().expect("the configuration is changed");
}
