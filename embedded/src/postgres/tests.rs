use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use sqlx::{Connection, Executor, PgConnection, Row};
use tokio::io::AsyncBufReadExt;

use super::{Error, Server, Settings};

/// The data directory of the server, set in the process that is killed.
const CHILD_DATA_DIR: &str = "LFS_TEST_POSTGRES_CHILD";

fn ephemeral(data_dir: &Path) -> Settings {
    Settings { fsync: false, ephemeral: true, ..Settings::new(data_dir) }
}

async fn wait_until_stopped(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
        assert!(Instant::now() < deadline, "the server on port {port} still runs after its process ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn data_port_and_password_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let persistent = Settings { ephemeral: false, ..ephemeral(directory.path()) };
    let server = Server::start(&persistent).await.unwrap();
    let url = server.url();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.execute("create table kept (text text); insert into kept values ('å')").await.unwrap();
    let row = connection.fetch_one("select current_setting('server_encoding'), datcollate from pg_database").await;
    let row = row.unwrap();
    assert_eq!((row.get::<&str, _>(0), row.get::<&str, _>(1)), ("UTF8", "C"));
    // A connected client does not delay the stop.
    server.stop().await.unwrap();
    wait_until_stopped(url_port(&url)).await;

    let server = Server::start(&ephemeral(directory.path())).await.unwrap();
    assert_eq!(server.url(), url);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let row = connection.fetch_one("select text from kept").await.unwrap();
    assert_eq!(row.get::<&str, _>(0), "å");
    let other = server.create_database("other \"one\"").await.unwrap();
    assert_eq!(server.create_database("other \"one\"").await.unwrap(), other);

    let mode = std::fs::metadata(server.data_dir().join("password")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let wrong = url.replacen(':', ":x", 2).replacen(":x", ":", 1);
    assert!(PgConnection::connect(&wrong).await.is_err(), "a wrong password is accepted");
    server.stop().await.unwrap();
    assert!(!directory.path().join("data").exists(), "an ephemeral server did not remove its data");
}

fn url_port(url: &str) -> u16 {
    url.rsplit(':').next().unwrap().split('/').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn the_server_stops_when_its_process_is_killed() {
    if let Some(data_dir) = std::env::var_os(CHILD_DATA_DIR) {
        let server = Server::start(&ephemeral(Path::new(&data_dir))).await.unwrap();
        println!("\nURL {}", server.url());
        std::future::pending::<()>().await;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "postgres::tests::the_server_stops_when_its_process_is_killed", "--nocapture"])
        .env(CHILD_DATA_DIR, directory.path())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let url = loop {
        let line = lines.next_line().await.unwrap().expect("the child prints the URL of its server");
        if let Some(url) = line.strip_prefix("URL ") {
            break url.to_owned();
        }
    };
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.ping().await.unwrap();
    child.kill().await.unwrap();
    wait_until_stopped(url_port(&url)).await;
    assert!(connection.ping().await.is_err());
    let deadline = Instant::now() + Duration::from_secs(20);
    while directory.path().join("data/PG_VERSION").exists() {
        assert!(Instant::now() < deadline, "the data of an ephemeral server remains after its process was killed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_crashed_server_and_an_incomplete_directory_are_recovered() {
    let directory = tempfile::tempdir().unwrap();
    let persistent = Settings { ephemeral: false, ..ephemeral(directory.path()) };
    let server = Server::start(&persistent).await.unwrap();
    let pid_file = server.data_dir.data().join("postmaster.pid");
    let stale = std::fs::read_to_string(&pid_file).unwrap();
    let server_dir = server.data_dir().to_owned();
    server.stop().await.unwrap();

    std::fs::write(&pid_file, stale).unwrap();
    let server = Server::start(&persistent).await.unwrap();
    server.stop().await.unwrap();

    // Without its password the directory is incomplete.
    std::fs::remove_file(server_dir.join("password")).unwrap();
    let server = Server::start(&ephemeral(directory.path())).await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port();
    let settings = Settings { port: Some(port), ..ephemeral(directory.path()) };
    assert!(matches!(Server::start(&settings).await, Err(Error::PortInUse(found)) if found == port));
    drop(occupied);
    let server = Server::start(&settings).await.unwrap();
    assert_eq!(url_port(&server.url()), port);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn data_of_another_version_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&Settings { ephemeral: false, ..ephemeral(directory.path()) }).await.unwrap();
    let version_file = server.data_dir.data().join("PG_VERSION");
    server.stop().await.unwrap();
    std::fs::write(&version_file, "9\n").unwrap();
    let error = Server::start(&ephemeral(directory.path())).await.err().unwrap();
    assert!(matches!(&error, Error::Version { created_by, .. } if created_by == "9"), "{error}");
}

#[tokio::test]
async fn a_data_directory_below_a_private_directory_works() {
    // Like /root. For users other than root this is like any other directory.
    let private = tempfile::tempdir().unwrap();
    std::fs::set_permissions(private.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let data_dir = private.path().join("below/it");
    let server = Server::start(&Settings { ephemeral: false, ..ephemeral(&data_dir) }).await.unwrap();
    let (url, server_dir) = (server.url(), server.data_dir().to_owned());
    server.stop().await.unwrap();
    let mode = std::fs::metadata(private.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "the mode of a parent directory was changed");

    let server = Server::start(&ephemeral(&data_dir)).await.unwrap();
    assert_eq!((server.url(), server.data_dir()), (url, server_dir.as_path()));
    server.stop().await.unwrap();
    assert!(!server_dir.join("data").exists() && !server_dir.join("password").exists());
}
