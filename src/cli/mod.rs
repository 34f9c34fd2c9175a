//! The command line: data to stdout, talk to stderr.

mod audit;
mod consume;
mod dev;
mod doctor;
mod get;
mod put;
mod serve;
mod talk;
mod token;
mod topics;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use lfs_broker_client as client;

use crate::telemetry::log;
use crate::{app, auth, config, http, kafka, objects, store};

#[derive(Parser)]
#[command(
    name = "lfs-broker",
    version,
    about = "The claim check for Kafka: bytes go straight into S3, verified pointers into Kafka"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API
    Serve {
        #[command(flatten)]
        config: Config,
        /// Check the settings and end
        #[arg(long)]
        check_config: bool,
    },
    /// Bring the database schema up to date
    Migrate {
        #[command(flatten)]
        config: Config,
    },
    /// Start the whole product on this machine: PostgreSQL, S3 and Kafka included
    Dev(dev::Arguments),
    /// Check the store, the database and Kafka, and tell what the store can do
    Doctor {
        #[command(flatten)]
        config: Config,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Upload files, or standard input, and print where their pointers are
    Put(put::Arguments),
    /// Write the bytes that a pointer stands for, verified
    Get(get::Arguments),
    /// Follow a topic, and save what its records stand for, verified
    Consume(consume::Arguments),
    /// Print a token for this broker's settings
    Token(token::Arguments),
    /// Compare the database, S3 and Kafka; exits with 0 when they agree, 1 with findings, 2 when it could not check
    Audit(audit::Arguments),
    /// Read and store topic policies
    Topics(topics::Arguments),
    /// Print the OpenAPI document
    Openapi,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(clap::Args)]
struct Config {
    /// A TOML file with settings; the environment wins over it
    #[arg(long, env = "LFS_BROKER_CONFIG")]
    config: Option<PathBuf>,
}

impl Config {
    fn load(&self) -> Result<app::Settings, Error> {
        Ok(config::load(self.config.as_deref(), |name| std::env::var(name).ok())?)
    }

    fn load_auth(&self) -> Result<auth::Settings, Error> {
        Ok(config::load_auth(self.config.as_deref(), |name| std::env::var(name).ok())?)
    }

    fn load_kafka(&self, bootstrap_servers: Option<&str>) -> Result<kafka::Settings, Error> {
        let named = |name: &str| match (name, bootstrap_servers) {
            ("KAFKA_BOOTSTRAP_SERVERS", Some(servers)) => Some(servers.to_owned()),
            _ => std::env::var(name).ok(),
        };
        Ok(config::load_kafka(self.config.as_deref(), named)?)
    }

    fn load_objects(&self) -> Result<objects::Settings, Error> {
        Ok(config::load_objects(self.config.as_deref(), |name| std::env::var(name).ok())?)
    }

    fn load_store(&self) -> Result<store::Settings, Error> {
        Ok(config::load_store(self.config.as_deref(), |name| std::env::var(name).ok())?)
    }
}

/// Which broker a command talks to, and as whom.
#[derive(clap::Args)]
struct Connection {
    /// The broker
    #[arg(long, env = "LFS_BROKER_URL", default_value = "http://127.0.0.1:8080")]
    broker: String,
    /// A bearer token
    #[arg(long, env = "LFS_BROKER_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Print JSON for machines, and no progress
    #[arg(long)]
    json: bool,
}

impl Connection {
    fn client(&self) -> Result<client::Client, Error> {
        let client = client::Client::new(&self.broker)?;
        Ok(match &self.token {
            Some(token) => client.with_token(token.as_str()),
            None => client,
        })
    }
}

/// Why a command failed; the kind decides the exit code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Config(#[from] config::Error),
    #[error("{0}")]
    App(#[from] app::Error),
    /// What contradicts itself is seen before anything is started.
    #[error("{0}")]
    Settings(app::Error),
    #[error("{0}")]
    Dev(#[from] crate::dev::Error),
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Objects(#[from] objects::Error),
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    #[error("{0}")]
    Client(#[from] client::Error),
    /// Also when all of it was repaired, as with fsck: whoever asks again hears that nothing is left.
    #[error("{0} findings")]
    Findings(u64),
    #[error("could not check: {0}")]
    Unchecked(crate::audit::Error),
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Token(#[from] auth::NotIssued),
    #[error("cannot write the output: {0}")]
    Output(std::io::Error),
    #[error("{name}: {source}")]
    OfFile { name: String, source: client::Error },
    /// A group stands before it, and comes back to it.
    #[error("{place}: {source}")]
    OfRecord { place: String, source: client::Error, past: String },
    /// Each was told when it happened.
    #[error("{failed} of {of} files were not uploaded")]
    OfFiles { failed: usize, of: usize, first: Box<Error> },
    #[error("{source}")]
    Upload { source: client::Error, resume: String },
    #[error("interrupted: {what}")]
    Interrupted { what: String, resume: Option<String> },
}

impl Error {
    fn of_file(source: client::Error, name: &str) -> Self {
        Self::OfFile { name: name.to_owned(), source }
    }

    /// 1 failed, 2 usage or settings, 3 refused by the broker, 4 integrity, 5 unreachable.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Settings(_) | Self::Usage(_) | Self::Unchecked(_) | Self::Token(_) => 2,
            Self::Dev(crate::dev::Error::App(app::Error::OpenToTheWorld(_))) => 2,
            Self::Store(store::Error::Url) | Self::Objects(objects::Error::Settings(_)) => 2,
            Self::Kafka(kafka::Error::Settings(_) | kafka::Error::Reserved(_) | kafka::Error::Limit { .. }) => 2,
            Self::OfFiles { first, .. } => first.exit_code(),
            Self::Kafka(kafka::Error::Unreachable(_)) | Self::Dev(crate::dev::Error::NoKafka { .. }) => 5,
            _ => self.of_client().map_or(1, client_exit_code),
        }
    }

    /// The client's error, where it is the reason.
    fn of_client(&self) -> Option<&client::Error> {
        match self {
            Self::Client(source) | Self::OfFile { source, .. } | Self::OfRecord { source, .. } | Self::Upload { source, .. } => {
                Some(source)
            }
            _ => None,
        }
    }

    /// Whether another file may fare better: this one cannot be read, changed while it was sent, or the broker takes none like it.
    fn is_of_one_file(&self) -> bool {
        match self {
            Self::OfFile { source: client::Error::Io(_), .. } => true,
            Self::OfFile { source, .. } => source.is_corrupt() || source.problem().is_some_and(|problem| problem.status == 422),
            _ => false,
        }
    }

    /// Says what is wrong and what to try.
    fn tell(&self) {
        talk::note(&format!("error: {self}"));
        if let Some(hint) = self.hint() {
            talk::note(&format!("hint: {hint}"));
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Store(store::Error::Schema { .. }) => MIGRATE,
            Self::App(error) | Self::Settings(error) | Self::Dev(crate::dev::Error::App(error)) => hint_of_app(error)?,
            Self::Dev(crate::dev::Error::NoKafka { .. }) => "is Kafka running there? without --kafka dev brings its own",
            Self::Config(config::Error::Missing(_)) => "the README has a table of all settings",
            Self::OfFile { source: client::Error::NoReferenceBucket(_), .. } => {
                "name the bucket with --reference-bucket; it is read with the AWS settings of the environment"
            }
            Self::OfRecord { past, .. } => return Some(format!("the group comes back to it; to go past it: {past}")),
            Self::Upload { resume, .. } | Self::Interrupted { resume: Some(resume), .. } => {
                return Some(format!("go on with: {resume}"));
            }
            _ => match self.of_client()? {
                client::Error::Unreachable { peer: "storage", .. } => {
                    "bytes go to S3 without the broker: is LFS_BROKER_S3_PUBLIC_ENDPOINT, for which it signs, open from here?"
                }
                client::Error::Unreachable { .. } => "is the broker running there? see --broker and LFS_BROKER_URL",
                _ => return None,
            },
        };
        Some(hint.to_owned())
    }
}

const MIGRATE: &str = "run `lfs-broker migrate` with the same DATABASE_URL";

fn hint_of_app(error: &app::Error) -> Option<&'static str> {
    match error {
        app::Error::Store(store::Error::Schema { .. }) => Some(MIGRATE),
        app::Error::OpenToTheWorld(_) => Some("listen on 127.0.0.1; `serve` with LFS_BROKER_AUTH_MODE=jwt may listen anywhere"),
        app::Error::Restored(_) => Some("run `lfs-broker audit --fix` with the same settings, then serve"),
        app::Error::Auth(_) => Some("for a first look, `lfs-broker dev` needs no tokens"),
        _ => None,
    }
}

fn client_exit_code(error: &client::Error) -> u8 {
    match error {
        error if error.is_corrupt() => 4,
        client::Error::Refused(_) | client::Error::Gone(_) | client::Error::Forbidden { .. } => 3,
        client::Error::Unreachable { .. } => 5,
        client::Error::Invalid(_) => 2,
        _ => 1,
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Reads FAILPOINTS, in builds of the tests only.
    let _failpoints = fail::has_failpoints().then(fail::FailScenario::setup);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            talk::note(&format!("error: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(cli.command));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.tell();
            ExitCode::from(error.exit_code())
        }
    }
}

async fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Serve { config, check_config } => serve::serve(config.load()?, check_config).await,
        Command::Migrate { config } => serve::migrate(config.load_store()?).await,
        Command::Dev(arguments) => dev::dev(arguments).await,
        Command::Doctor { config, json } => doctor::doctor(config.load()?, json).await,
        Command::Put(arguments) => put::put(arguments).await,
        Command::Get(arguments) => get::get(arguments).await,
        Command::Consume(arguments) => consume::consume(arguments).await,
        Command::Token(arguments) => token::token(arguments),
        Command::Audit(arguments) => audit::audit(arguments).await,
        Command::Topics(arguments) => topics::topics(arguments).await,
        Command::Openapi => talk::data(&http::openapi().to_pretty_json().expect("the document has only strings and numbers")),
        Command::Completions { shell } => {
            // It takes no error of what it writes to.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "lfs-broker", &mut script);
            talk::data(String::from_utf8_lossy(&script).trim_end())
        }
    }
}

/// Removes what killed commands left in a directory. Where it cannot be, whoever writes there next says why.
fn sweep(directory: Option<&std::path::Path>) {
    let directory = directory.filter(|path| !path.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let _ = client::clean(directory);
}

/// Returns when SIGINT or SIGTERM arrives. This call installs the handlers, so a signal before the first poll counts too.
fn asked_to_end() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(signal).map(|signal| async move {
        match signal {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    });
    async {
        tokio::select! { () = interrupt => {}, () = terminate => {} }
    }
}
