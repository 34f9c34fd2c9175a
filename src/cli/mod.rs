//! The command line: data goes to stdout, messages go to stderr.

mod audit;
mod connection;
mod consume;
#[cfg(feature = "dev")]
mod dev;
#[cfg(feature = "dev")]
mod dev_settings;
mod doctor;
mod get;
mod output;
mod put;
mod serve;
mod token;
mod topics;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use lfs_broker_client as client;

use crate::telemetry::init_logging;
use crate::{app, auth, config, http, kafka, objects, store};
use output::{print_data, print_note};

#[derive(Parser)]
#[command(name = "lfs-broker", version, about)]
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
        /// Check the settings and exit
        #[arg(long)]
        check_config: bool,
    },
    /// Migrate the database schema to the current version
    Migrate {
        #[command(flatten)]
        config: Config,
    },
    /// Start the broker on this machine, with PostgreSQL, S3 and Kafka included
    #[cfg(feature = "dev")]
    Dev(dev::Arguments),
    /// Check the database, Kafka and the S3 store, and report what the store enforces
    Doctor {
        #[command(flatten)]
        config: ConfigOrDev,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Upload files or standard input, and print the pointer of each upload
    Put(put::Arguments),
    /// Download the object of a pointer, and verify its bytes
    Get(get::Arguments),
    /// Consume a topic, and save the verified data of each record to a file
    Consume(consume::Arguments),
    /// Print a token, signed with the settings of the broker
    Token(token::Arguments),
    /// Compare the database, S3 and Kafka; exit code 0: they agree, 1: there are findings, 2: the comparison failed
    Audit(audit::Arguments),
    /// List, print, store and delete topic policies
    Topics(topics::Arguments),
    /// Print the OpenAPI document
    Openapi,
    /// Print the completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[cfg(not(feature = "dev"))]
use Config as ConfigOrDev;
#[cfg(feature = "dev")]
use dev_settings::ConfigOrDev;

#[derive(clap::Args)]
struct Config {
    /// A TOML file with settings; environment variables override it
    #[arg(long, env = "LFS_BROKER_CONFIG")]
    config: Option<PathBuf>,
}

impl Config {
    fn load(&self) -> Result<app::Settings, Error> {
        Ok(config::load(self.config.as_deref(), &environment())?)
    }

    fn load_auth(&self) -> Result<auth::Settings, Error> {
        Ok(config::load_auth(self.config.as_deref(), &environment())?)
    }

    fn load_kafka(&self, bootstrap_servers: Option<&str>) -> Result<kafka::Settings, Error> {
        let argument = bootstrap_servers.map(|servers| ("KAFKA_BOOTSTRAP_SERVERS".to_owned(), servers.to_owned()));
        let environment = environment().into_iter().chain(argument).collect();
        Ok(config::load_kafka(self.config.as_deref(), &environment)?)
    }

    fn load_objects(&self) -> Result<objects::Settings, Error> {
        Ok(config::load_objects(self.config.as_deref(), &environment())?)
    }

    fn load_store(&self) -> Result<store::Settings, Error> {
        Ok(config::load_store(self.config.as_deref(), &environment())?)
    }
}

/// The environment. A variable that is not UTF-8 belongs to another program, so it is left out.
fn environment() -> config::Environment {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect()
}

/// Why a command failed. The variant decides the exit code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Config(#[from] config::Error),
    /// A setting is missing, but a `dev` runs in this directory.
    #[cfg(feature = "dev")]
    #[error("{0}")]
    MissingBesideDev(config::Error),
    #[error("{0}")]
    App(#[from] app::Error),
    /// The settings are invalid, which is checked before anything starts.
    #[error("{0}")]
    Settings(app::Error),
    #[cfg(feature = "dev")]
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
    /// The audit has findings. Repaired findings count too, as with fsck; the next run then exits with 0.
    #[error("{0} findings")]
    Findings(u64),
    #[error("could not check: {0}")]
    AuditFailed(crate::audit::Error),
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Token(#[from] auth::IssueError),
    #[error("cannot write the output: {0}")]
    Output(std::io::Error),
    #[error("{}", file_text(.name, .source))]
    File { name: String, source: client::Error },
    /// The consumer group stays at this record, so the next run reads the record again.
    #[error("{record}: {source}")]
    Record { record: String, source: client::Error, skip_command: String },
    /// Some files failed. The error of each file was already printed.
    #[error("{failed} of {total} files were not uploaded")]
    Files { failed: usize, total: usize, first: Box<Error> },
    #[error("{source}")]
    Upload { source: client::Error, resume_command: String },
    /// A member of the JSON text that the user gave is not valid. `position` says where the member is.
    #[error("{source}; {position}")]
    Member { source: client::Error, position: String },
    #[error("interrupted: {outcome}")]
    Interrupted { outcome: String, resume_command: Option<String> },
}

impl Error {
    fn file(source: client::Error, name: &str) -> Self {
        Self::File { name: name.to_owned(), source }
    }

    /// 1: failed, 2: usage or settings, 3: refused by the broker, 4: integrity, 5: unreachable.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Settings(_) | Self::Usage(_) | Self::AuditFailed(_) | Self::Token(_) => 2,
            #[cfg(feature = "dev")]
            Self::MissingBesideDev(_) | Self::Dev(crate::dev::Error::App(app::Error::NoAuthOnPublicAddress(_))) => 2,
            Self::Store(store::Error::InvalidUrl) | Self::Objects(objects::Error::Settings(_)) => 2,
            Self::Kafka(kafka::Error::Settings(_) | kafka::Error::Reserved(_) | kafka::Error::Limit { .. }) => 2,
            Self::Files { first, .. } => first.exit_code(),
            #[cfg(feature = "dev")]
            Self::Dev(crate::dev::Error::NoKafka { .. }) => 5,
            Self::Kafka(kafka::Error::Unreachable(_)) => 5,
            _ => self.client_error().map_or(1, client_exit_code),
        }
    }

    /// The error of the client library, if it is the cause.
    fn client_error(&self) -> Option<&client::Error> {
        match self {
            Self::Client(source)
            | Self::File { source, .. }
            | Self::Record { source, .. }
            | Self::Member { source, .. }
            | Self::Upload { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Whether other files may succeed: the error is that this file cannot be read, has changed during the upload, or is
    /// rejected by the broker.
    fn concerns_one_file(&self) -> bool {
        match self {
            Self::File { source: client::Error::Io(_), .. } => true,
            Self::File { source, .. } => source.is_corrupt() || source.problem().is_some_and(|problem| problem.status == 422),
            _ => false,
        }
    }

    /// Prints the error and hints about the next step. `token` and `broker` are those of the command.
    fn print_with_hint(&self, token: Option<&str>, broker: Option<&str>) {
        print_note(&format!("error: {self}"));
        let is_unauthorized = || self.client_error()?.problem().filter(|problem| problem.status == 401);
        let token_hint = is_unauthorized().map(|_| connection::token_hint(token));
        let is_no_route = self.client_error().is_some_and(|error| error.is_problem(client::api::ErrorCode::NotFound));
        let broker = broker.filter(|_| is_no_route);
        let path_hint = broker.map(|broker| format!("the path of the broker's URL may be wrong: {broker}"));
        for hint in token_hint.into_iter().chain(path_hint).chain(self.hint()) {
            print_note(&format!("hint: {hint}"));
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Store(error) => store_hint(error)?,
            #[cfg(feature = "dev")]
            Self::MissingBesideDev(_) => "`lfs-broker dev` runs in this directory: use its servers with --dev",
            Self::App(error) | Self::Settings(error) => app_hint(error)?,
            #[cfg(feature = "dev")]
            Self::Dev(crate::dev::Error::App(app::Error::Listen(..))) => {
                "another program may use this port: choose another one with --listen, such as --listen 127.0.0.1:8081"
            }
            #[cfg(feature = "dev")]
            Self::Dev(crate::dev::Error::App(error)) => app_hint(error)?,
            #[cfg(feature = "dev")]
            Self::Dev(crate::dev::Error::NoKafka { .. }) => {
                "check that Kafka runs at this address; without --kafka, dev starts an embedded Kafka"
            }
            Self::Config(config::Error::Missing(_) | config::Error::Unknown(_)) => "docs/configuration.md lists all settings",
            #[cfg(feature = "dev")]
            Self::Dev(crate::dev::Error::AlreadyRunning(_)) => "stop it, or use another --data-dir",
            Self::File { source: client::Error::Io(error), .. } if error.kind() == std::io::ErrorKind::IsADirectory => {
                "upload the files of a directory with --recursive"
            }
            Self::File { source: client::Error::NoReferenceBucket(_), .. } => {
                "name the bucket with --reference-bucket; the command reads it with the AWS settings of the environment"
            }
            Self::Record { skip_command, .. } => {
                return Some(format!("the next run of the group reads this record again; to skip it, run: {skip_command}"));
            }
            Self::Upload { resume_command, .. } | Self::Interrupted { resume_command: Some(resume_command), .. } => {
                return Some(format!("resume with: {resume_command}"));
            }
            _ => match self.client_error()? {
                client::Error::Unreachable { peer: "storage", .. } => {
                    "file data goes directly to S3: check that the broker's LFS_BROKER_S3_PUBLIC_ENDPOINT is reachable from here"
                }
                client::Error::Unreachable { .. } => {
                    "check that the broker runs at this address; set the address with --broker or LFS_BROKER_URL"
                }
                _ => return None,
            },
        };
        Some(hint.to_owned())
    }
}

/// Some errors of a file begin with its name. The name is then not repeated.
fn file_text(name: &str, source: &client::Error) -> String {
    let text = source.to_string();
    if text.starts_with(&format!("{name} ")) { text } else { format!("{name}: {text}") }
}

const MIGRATE_HINT: &str = "run `lfs-broker migrate` with the same DATABASE_URL";

fn store_hint(error: &store::Error) -> Option<&'static str> {
    match error {
        store::Error::OutdatedSchema { .. } => Some(MIGRATE_HINT),
        error if error.is_unreachable() => Some("check that PostgreSQL runs at this address; DATABASE_URL sets the address"),
        _ => None,
    }
}

fn app_hint(error: &app::Error) -> Option<&'static str> {
    match error {
        app::Error::Store(error) => store_hint(error),
        app::Error::Objects(objects::Error::Refused { code, .. }) if code == "NoSuchBucket" => {
            Some("create the bucket, or name another one with LFS_BROKER_S3_BUCKET; AWS_ENDPOINT_URL_S3 sets the endpoint")
        }
        app::Error::NoAuthOnPublicAddress(_) => {
            Some("listen on 127.0.0.1, or run `serve` with LFS_BROKER_AUTH_MODE=jwt, which may listen on any address")
        }
        app::Error::DatabaseRestored(_) => Some("run `lfs-broker audit --fix` with the same settings, then start `serve` again"),
        app::Error::Auth(_) if cfg!(feature = "dev") => Some("to try the broker without tokens, run `lfs-broker dev`"),
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
    // Reads FAILPOINTS; only test builds have failpoints.
    let _failpoints = fail::has_failpoints().then(fail::FailScenario::setup);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            print_note(&format!("error: cannot start the async runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let (broker, token) = cli.command.broker_and_token();
    let outcome = runtime.block_on(run(cli.command));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.print_with_hint(token.as_deref(), broker.as_deref());
            ExitCode::from(error.exit_code())
        }
    }
}

impl Command {
    /// The URL of the broker, and the token for calls to it.
    fn broker_and_token(&self) -> (Option<String>, Option<String>) {
        let (broker, token) = match self {
            Self::Put(put::Arguments { connection, .. })
            | Self::Get(get::Arguments { connection, .. })
            | Self::Consume(consume::Arguments { connection, .. }) => (&connection.broker, &connection.token),
            Self::Topics(arguments) => (&arguments.broker, &arguments.token),
            _ => return (None, None),
        };
        (Some(broker.clone()), token.clone())
    }
}

async fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Serve { config, check_config } => serve::serve(config.load()?, check_config).await,
        Command::Migrate { config } => serve::migrate(config.load_store()?).await,
        #[cfg(feature = "dev")]
        Command::Dev(arguments) => dev::dev(arguments).await,
        Command::Doctor { config, json } => doctor::doctor(config.load()?, json).await,
        Command::Put(arguments) => put::put(arguments).await,
        Command::Get(arguments) => get::get(arguments).await,
        Command::Consume(arguments) => consume::consume(arguments).await,
        Command::Token(arguments) => token::token(arguments),
        Command::Audit(arguments) => audit::audit(arguments).await,
        Command::Topics(arguments) => topics::topics(arguments).await,
        Command::Openapi => {
            print_data(&http::openapi().to_pretty_json().expect("the document contains only strings and numbers"))
        }
        Command::Completions { shell } => {
            // `generate` panics if it cannot write, so it writes to memory first.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "lfs-broker", &mut script);
            print_data(String::from_utf8_lossy(&script).trim_end())
        }
    }
}

/// Removes partial downloads that killed commands left in a directory. Errors are ignored, because the next write into the
/// directory reports them.
fn remove_partial_downloads(directory: Option<&std::path::Path>) {
    let directory = directory.filter(|path| !path.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let _ = client::remove_partial_downloads(directory);
}

/// Completes when SIGINT or SIGTERM arrives. The call installs the handlers, so a signal before the first poll counts too.
fn shutdown_signal() -> impl Future<Output = ()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(command: &clap::Command) -> Vec<String> {
        let own = command.get_arguments().filter_map(|argument| argument.get_env()?.to_str().map(str::to_owned));
        own.chain(command.get_subcommands().flat_map(variables)).collect()
    }

    #[test]
    fn serve_accepts_every_variable_that_another_command_reads() {
        let variables = variables(&Cli::command());
        assert!(variables.contains(&"LFS_BROKER_URL".to_owned()));
        for variable in variables {
            let error = config::load(None, &[(variable.clone(), "1".to_owned())].into()).err();
            assert!(matches!(error, Some(config::Error::Missing(_))), "{variable}: {error:?}");
        }
    }

    #[test]
    fn the_command_dev_exists_only_with_the_feature_dev() {
        assert_eq!(Cli::command().find_subcommand("dev").is_some(), cfg!(feature = "dev"));
    }
}
