//! The servers behind every `House`: embedded ones, started once a process, or real neighbours named by variables.
//!
//! `LFS_TEST_DATABASE_URL` (a superuser's), `LFS_TEST_KAFKA` (host:port), `LFS_TEST_S3_ENDPOINT` with
//! `LFS_TEST_S3_ACCESS_KEY_ID`, `LFS_TEST_S3_SECRET_ACCESS_KEY` and `LFS_TEST_S3_FLAVOUR` (`minio`, `versitygw`).

use std::env::var;
use std::sync::OnceLock;

use lfs_broker::dev::{kafka, postgres};
use lfs_broker::store;
use sqlx::{Connection as _, Executor as _, PgConnection};
use uuid::Uuid;

use crate::stores::Place;

/// Everything that all houses share.
pub(crate) struct Servers {
    admin_url: String,
    template: String,
    pub(crate) s3: &'static Place,
    pub(crate) kafka: String,
    /// Whether Kafka is a real one: it has transactions.
    pub(crate) real_kafka: bool,
    // Dropping them would end them; the process does.
    _postgres: Option<postgres::Server>,
    _kafka: Option<kafka::Server>,
    _files: tempfile::TempDir,
}

static SERVERS: OnceLock<Servers> = OnceLock::new();

/// The servers, started on the first call on a runtime that outlives every test's own.
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
    let template = make_template(&admin_url).await;
    let (kafka, real_kafka, kafka_server) = match var("LFS_TEST_KAFKA") {
        Ok(bootstrap) => (bootstrap, true, None),
        Err(_) => {
            let server = kafka::Server::start().expect("the embedded Kafka starts");
            // As `dev` does: the embedded one makes no topic for an administrator. A deployment has four shards.
            server.create_topic(lfs_broker::kafka::MARKER_TOPIC, 4).await.expect("the embedded Kafka makes a topic");
            (server.bootstrap_servers(), false, Some(server))
        }
    };
    Servers {
        admin_url,
        template,
        s3: Place::for_tests(),
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

/// Migrated once; each house's database is a copy, which is much faster than migrating it.
async fn make_template(admin_url: &str) -> String {
    let template = format!("lfs_template_{}", Uuid::new_v4().simple());
    create_database(admin_url, &template, "template1").await;
    let store = store::Store::connect(&store::Settings::new(&url_of(admin_url, &template))).unwrap();
    store.migrate().await.expect("the migrations run");
    // A template must have no connection when it is copied.
    store.close().await;
    template
}

async fn create_database(admin_url: &str, name: &str, template: &str) {
    let mut admin = PgConnection::connect(admin_url).await.expect("PostgreSQL answers");
    // Two copies of one template at a time are refused; the lock makes them wait for each other.
    admin.execute("select pg_advisory_lock(20261121)").await.unwrap();
    let create = format!("create database {name} template {template}");
    admin.execute(sqlx::AssertSqlSafe(create)).await.expect("a database is made");
    admin.close().await.unwrap();
}

impl Servers {
    /// What no answer may tell: where the servers are, and how one is let in.
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
        // A copy is a deployment of its own: two of one identity would fence each other, and read each other's markers.
        let mut database = PgConnection::connect(&url).await.expect("PostgreSQL answers");
        database.execute("update deployment set id = gen_random_uuid()").await.expect("the copy gets an identity");
        database.close().await.unwrap();
        url
    }
}

/// Makes a topic: in the embedded Kafka by its own verb, in a real one as an administrator would.
pub(crate) async fn make_topic(topic: &str, partitions: i32) {
    use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
    use rdkafka::client::DefaultClientContext;
    let servers = servers();
    if let Some(embedded) = &servers._kafka {
        return embedded.create_topic(topic, partitions).await.expect("the embedded Kafka makes a topic");
    }
    let admin: AdminClient<DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &servers.kafka).create().expect("an admin client is made");
    let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    let outcome = admin.create_topics(&[new], &AdminOptions::new()).await.expect("Kafka answers");
    outcome[0].as_ref().expect("the topic is made");
}

/// Deletes a topic of a real Kafka; the embedded one keeps what it has.
pub(crate) async fn delete_topic(topic: &str) {
    use rdkafka::admin::{AdminClient, AdminOptions};
    use rdkafka::client::DefaultClientContext;
    let admin: AdminClient<DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).create().expect("an admin client is made");
    let outcome = admin.delete_topics(&[topic], &AdminOptions::new()).await.expect("Kafka answers");
    outcome[0].as_ref().expect("the topic is deleted");
}

/// Changes a topic's configuration in a real Kafka.
pub(crate) async fn set_config(topic: &str, entries: &[(&str, &str)]) {
    use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
    use rdkafka::client::DefaultClientContext;
    let admin: AdminClient<DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).create().expect("an admin client is made");
    let config = AlterConfig::new(ResourceSpecifier::Topic(topic));
    let config = entries.iter().fold(config, |config, (key, value)| config.set(key, value));
    let outcome = admin.alter_configs([&config], &AdminOptions::new()).await.expect("Kafka answers");
    outcome[0].as_ref().expect("the configuration is changed");
}
