//! `--dev`: the settings of a running `lfs-broker dev`, read from its `dev.json`.

use std::path::{Path, PathBuf};

use super::output::print_note;
use super::{Config, Error};
use crate::dev::{self, Endpoints};
use crate::{app, config};

/// The data directory of `dev` if none is given.
pub(super) const DEFAULT_DATA_DIR: &str = ".lfs-broker";

/// The settings of a command: from the environment and a file, or of a running `dev`.
#[derive(clap::Args)]
pub(super) struct ConfigOrDev {
    #[command(flatten)]
    config: Config,
    /// Use the servers of the running `lfs-broker dev` with this data directory [default: .lfs-broker]
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = DEFAULT_DATA_DIR)]
    dev: Option<PathBuf>,
}

impl ConfigOrDev {
    pub(super) fn load(&self) -> Result<app::Settings, Error> {
        match &self.dev {
            Some(directory) => {
                let settings = load(directory)?;
                if !dev::may_run(directory) {
                    print_note(&format!(
                        "note: {} is old: the `lfs-broker dev` that wrote it does not run any more",
                        dev_json(directory).display()
                    ));
                }
                Ok(settings)
            }
            None => self.config.load().map_err(|error| match error {
                Error::Config(source @ config::Error::Missing(_))
                    if dev_json(Path::new(DEFAULT_DATA_DIR)).exists() && dev::may_run(Path::new(DEFAULT_DATA_DIR)) =>
                {
                    Error::MissingBesideDev(source)
                }
                error => error,
            }),
        }
    }
}

fn dev_json(directory: &Path) -> PathBuf {
    directory.join("dev.json")
}

/// The settings that `dev` runs its broker with. The environment does not change them.
fn load(directory: &Path) -> Result<app::Settings, Error> {
    let path = dev_json(directory);
    let json = std::fs::read(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::Usage(format!(
            "no `lfs-broker dev` runs with the data directory {}: {} does not exist",
            directory.display(),
            path.display()
        )),
        _ => Error::Usage(format!("cannot read {}: {error}", path.display())),
    })?;
    let endpoints: Endpoints = serde_json::from_slice(&json)
        .map_err(|error| Error::Usage(format!("{} is not a file of `lfs-broker dev`: {error}", path.display())))?;
    let environment = [
        ("DATABASE_URL", endpoints.database_url.as_str()),
        ("KAFKA_BOOTSTRAP_SERVERS", &endpoints.kafka_bootstrap),
        ("LFS_BROKER_S3_BUCKET", &endpoints.bucket),
        ("LFS_BROKER_AUTH_MODE", "none"),
        // The embedded Kafka has no transactions, and a real one can be checked without them too.
        ("LFS_BROKER_DELIVERY", "at_least_once"),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let mut settings = config::load(None, &environment)?;
    settings.objects.endpoint = Some(endpoints.s3_endpoint.clone());
    settings.objects.region = Some(endpoints.s3_region.clone());
    settings.objects.access_key_id = Some(endpoints.s3_access_key_id.clone());
    settings.objects.secret_access_key = Some(endpoints.s3_secret_access_key.clone());
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dev_whose_lock_is_free_does_not_run() {
        let directory = tempfile::tempdir().unwrap();
        assert!(dev::may_run(directory.path()), "nothing is known without a lock file");
        let lock = std::fs::File::create(directory.path().join("lock")).unwrap();
        lock.lock().unwrap();
        assert!(dev::may_run(directory.path()));
        lock.unlock().unwrap();
        assert!(!dev::may_run(directory.path()));
    }

    #[test]
    fn the_settings_come_from_dev_json() {
        let directory = tempfile::tempdir().unwrap();
        let missing = load(directory.path()).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(missing.starts_with("no `lfs-broker dev` runs with the data directory"), "{missing}");
        let endpoints = Endpoints {
            broker_url: "http://127.0.0.1:8080".to_owned(),
            s3_endpoint: "http://127.0.0.1:9".to_owned(),
            s3_region: "us-east-1".to_owned(),
            s3_access_key_id: "key".to_owned(),
            s3_secret_access_key: "secret".to_owned(),
            bucket: "lfs-dev".to_owned(),
            kafka_bootstrap: "127.0.0.1:7".to_owned(),
            database_url: "postgres://u:p@127.0.0.1:5/d".to_owned(),
            postgres_dir: directory.path().to_owned(),
        };
        std::fs::write(dev_json(directory.path()), serde_json::to_vec(&endpoints).unwrap()).unwrap();
        let settings = load(directory.path()).unwrap();
        assert_eq!((settings.store.url, settings.kafka.bootstrap_servers), (endpoints.database_url, endpoints.kafka_bootstrap));
        let objects = settings.objects;
        assert_eq!((objects.bucket, objects.endpoint), (Some(endpoints.bucket), Some(endpoints.s3_endpoint)));
        assert_eq!((objects.access_key_id, objects.secret_access_key), (Some("key".to_owned()), Some("secret".to_owned())));
    }
}
