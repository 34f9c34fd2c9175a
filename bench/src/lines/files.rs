//! Files: the commands `put` and `get` beside `aws s3 cp` and `mc cp`, where these are installed.

use std::path::Path;
use std::time::Instant;

use serde::Deserialize;
use tokio::process::Command;

use crate::clients::Payload;
use crate::limits::new_key;
use crate::report::{Row, Target};
use crate::servers::{Servers, TOPIC, output};
use crate::{Failure, MAIN_DATABASE, Run};

const PUT: Target = Target::RatioAtLeast(1.3);
const GET: Target = Target::RatioAtLeast(1.1);

/// Another program that copies files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copier {
    Aws,
    Mc,
}

/// The times of one program, in seconds.
#[derive(Default)]
struct Times {
    put: Vec<f64>,
    get: Vec<f64>,
}

#[derive(Deserialize)]
struct Completed {
    id: String,
}

impl Copier {
    fn name(self) -> &'static str {
        match self {
            Self::Aws => "aws s3 cp",
            Self::Mc => "mc cp",
        }
    }

    /// Whether the program is installed. Another program also has the name `mc`, so its version is read.
    async fn is_installed(self) -> bool {
        let (program, word) = match self {
            Self::Aws => ("aws", "aws-cli"),
            Self::Mc => ("mc", "MinIO"),
        };
        output(Command::new(program).arg("--version")).await.is_ok_and(|printed| printed.contains(word))
    }

    /// Copies between a file and an object: the one of `from` and `to` that is an object is its key.
    fn copy(self, servers: &Servers, dir: &Path, file: &Path, key: &str, is_put: bool) -> Command {
        let (s3, bucket) = servers.s3();
        let (mut command, object) = match self {
            Self::Aws => (Command::new("aws"), format!("s3://{bucket}/{key}")),
            Self::Mc => (Command::new("mc"), format!("bench/{bucket}/{key}")),
        };
        match self {
            Self::Aws => {
                command.args(["s3", "cp", "--only-show-errors", "--endpoint-url", &s3.endpoint]);
                command.envs(servers.s3_variables()).env("AWS_EC2_METADATA_DISABLED", "true");
            }
            Self::Mc => {
                let host = s3.endpoint.replacen("://", &format!("://{}:{}@", s3.access_key_id, s3.secret_access_key), 1);
                command.arg("--quiet").arg("--config-dir").arg(dir.join("mc")).arg("cp").env("MC_HOST_bench", host);
            }
        }
        if is_put {
            command.arg(file).arg(object)
        } else {
            command.arg(object).arg(file)
        };
        command
    }
}

/// The time of `put` and `get` for one file.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    let (size, size_name) = if run.plan.is_full { (1 << 30, "1 GiB") } else { (128 << 20, "128 MiB") };
    let file = run.servers.dir.join("file");
    std::fs::write(&file, &Payload::random(size).bytes)?;
    let back = run.servers.dir.join("back");
    let mut copiers = Vec::new();
    for copier in [Copier::Aws, Copier::Mc] {
        match copier.is_installed().await {
            true => copiers.push((copier, Times::default())),
            false => run.missing.push(format!("files: {} is not installed here", copier.name())),
        }
    }
    let mut own = Times::default();
    for _ in 0..run.plan.rounds {
        for (copier, times) in &mut copiers {
            let (servers, key) = (&run.servers, new_key());
            times.put.push(seconds(&mut copier.copy(servers, &servers.dir, &file, &key, true)).await?.0);
            times.get.push(seconds(&mut copier.copy(servers, &servers.dir, &back, &key, false)).await?.0);
            std::fs::remove_file(&back)?;
        }
        let url = run.main_broker().await?.url().to_owned();
        let mut put = own_command(&run.servers, &url);
        let (time, printed) = seconds(put.arg("put").arg(&file).args(["--topic", TOPIC, "--json"])).await?;
        own.put.push(time);
        let completed: Completed = serde_json::from_str(printed.lines().next().unwrap_or_default())
            .map_err(|error| Failure(format!("put printed no upload: {error}: {printed}")))?;
        let mut get = own_command(&run.servers, &url);
        own.get.push(seconds(get.args(["get", "--json", "--upload", &completed.id, "--output"]).arg(&back)).await?.0);
        std::fs::remove_file(&back)?;
    }
    std::fs::remove_file(&file)?;
    add_rows(run, size_name, size as f64 / 1_000_000.0, &own, &copiers);
    Ok(())
}

/// Speeds, because a higher ratio shall be better. The target counts for the faster of the other programs.
fn add_rows(run: &mut Run, size: &str, megabytes: f64, own: &Times, copiers: &[(Copier, Times)]) {
    let speeds = |times: &[f64]| times.iter().map(|seconds| megabytes / seconds).collect::<Vec<f64>>();
    for (verb, target) in [("put", PUT), ("get", GET)] {
        let of = |times: &Times| if verb == "put" { speeds(&times.put) } else { speeds(&times.get) };
        for (copier, times) in copiers {
            let row = Row::ratio(format!("{verb} of {size}, MB/s"), format!("{}, MB/s", copier.name()), of(own), of(times));
            run.rows.push(row.target(target));
        }
        if copiers.is_empty() {
            run.rows.push(Row::value(format!("{verb} of {size}, MB/s"), of(own)));
        }
    }
}

/// The broker's command line client, as the first tenant.
fn own_command(servers: &Servers, url: &str) -> Command {
    let mut command = servers.broker(MAIN_DATABASE, &[]);
    command.env("LFS_BROKER_URL", url).env("LFS_BROKER_TOKEN", &servers.tokens[0]);
    command
}

/// How long a command takes, and what it prints.
async fn seconds(command: &mut Command) -> Result<(f64, String), Failure> {
    let began = Instant::now();
    let printed = output(command).await?;
    Ok((began.elapsed().as_secs_f64(), printed))
}
