use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use sqlx::{Connection, Executor, PgConnection, Row};
use tokio::io::AsyncBufReadExt;

use super::{Error, Server, Settings};

/// Set in the process that is killed: where its server's data are.
const CHILD: &str = "LFS_TEST_POSTGRES_CHILD";

fn quick(data_dir: &Path) -> Settings {
    Settings { fsync: false, ephemeral: true, ..Settings::new(data_dir) }
}

async fn gone(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
        assert!(Instant::now() < deadline, "the server on port {port} outlived its owner");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn data_port_and_password_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let lasting = Settings { ephemeral: false, ..quick(directory.path()) };
    let server = Server::start(&lasting).await.unwrap();
    let url = server.url();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.execute("create table kept (text text); insert into kept values ('å')").await.unwrap();
    let row = connection.fetch_one("select current_setting('server_encoding'), datcollate from pg_database").await;
    let row = row.unwrap();
    assert_eq!((row.get::<&str, _>(0), row.get::<&str, _>(1)), ("UTF8", "C"));
    // A client that stays connected does not hold up the stop.
    server.stop().await.unwrap();
    gone(url_port(&url)).await;

    let server = Server::start(&quick(directory.path())).await.unwrap();
    assert_eq!(server.url(), url);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let row = connection.fetch_one("select text from kept").await.unwrap();
    assert_eq!(row.get::<&str, _>(0), "å");
    let other = server.create_database("other \"one\"").await.unwrap();
    assert_eq!(server.create_database("other \"one\"").await.unwrap(), other);

    let mode = std::fs::metadata(server.home().join("password")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let wrong = url.replacen(':', ":x", 2).replacen(":x", ":", 1);
    assert!(PgConnection::connect(&wrong).await.is_err(), "a wrong password opens it");
    server.stop().await.unwrap();
    assert!(!directory.path().join("data").exists(), "an ephemeral server leaves its data");
}

fn url_port(url: &str) -> u16 {
    url.rsplit(':').next().unwrap().split('/').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn the_server_dies_with_a_process_that_is_killed() {
    if let Some(data_dir) = std::env::var_os(CHILD) {
        let server = Server::start(&quick(Path::new(&data_dir))).await.unwrap();
        println!("\nURL {}", server.url());
        std::future::pending::<()>().await;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "dev::postgres::tests::the_server_dies_with_a_process_that_is_killed", "--nocapture"])
        .env(CHILD, directory.path())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let url = loop {
        let line = lines.next_line().await.unwrap().expect("the child says where its server is");
        if let Some(url) = line.strip_prefix("URL ") {
            break url.to_owned();
        }
    };
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.ping().await.unwrap();
    child.kill().await.unwrap();
    gone(url_port(&url)).await;
    assert!(connection.ping().await.is_err());
    let deadline = Instant::now() + Duration::from_secs(20);
    while directory.path().join("data/PG_VERSION").exists() {
        assert!(Instant::now() < deadline, "an ephemeral server whose owner was killed leaves its data");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_crashed_server_and_a_half_made_directory_are_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let lasting = Settings { ephemeral: false, ..quick(directory.path()) };
    let server = Server::start(&lasting).await.unwrap();
    let pid_file = server.place.data().join("postmaster.pid");
    let stale = std::fs::read_to_string(&pid_file).unwrap();
    let home = server.home().to_owned();
    server.stop().await.unwrap();

    std::fs::write(&pid_file, stale).unwrap();
    let server = Server::start(&lasting).await.unwrap();
    server.stop().await.unwrap();

    // Without its password the directory counts as never finished.
    std::fs::remove_file(home.join("password")).unwrap();
    let server = Server::start(&quick(directory.path())).await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let settings = Settings { port: Some(port), ..quick(directory.path()) };
    assert!(matches!(Server::start(&settings).await, Err(Error::Port(found)) if found == port));
    drop(taken);
    let server = Server::start(&settings).await.unwrap();
    assert_eq!(url_port(&server.url()), port);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn data_of_another_version_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&Settings { ephemeral: false, ..quick(directory.path()) }).await.unwrap();
    let version_file = server.place.data().join("PG_VERSION");
    server.stop().await.unwrap();
    std::fs::write(&version_file, "9\n").unwrap();
    let refused = Server::start(&quick(directory.path())).await.err().unwrap();
    assert!(matches!(&refused, Error::Version { made_by, .. } if made_by == "9"), "{refused}");
}

#[tokio::test]
async fn a_directory_below_one_that_is_closed_to_others_will_do() {
    // As /root is; for anybody but root this is like any other directory.
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let data_dir = closed.path().join("below/it");
    let server = Server::start(&Settings { ephemeral: false, ..quick(&data_dir) }).await.unwrap();
    let (url, home) = (server.url(), server.home().to_owned());
    server.stop().await.unwrap();
    let mode = std::fs::metadata(closed.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "a directory that is not ours was opened");

    let server = Server::start(&quick(&data_dir)).await.unwrap();
    assert_eq!((server.url(), server.home()), (url, home.as_path()));
    server.stop().await.unwrap();
    assert!(!home.join("data").exists() && !home.join("password").exists());
}
