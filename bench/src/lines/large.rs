//! Large uploads: 64 MiB and 1 GiB through the broker, beside the same bytes sent straight to S3 in presigned parts.

use std::time::Instant;

use bytes::Bytes;
use lfs_broker_client::{Client, UploadOptions};

use crate::clients::Payload;
use crate::limits::new_key;
use crate::report::{Row, Target};
use crate::servers::TOPIC;
use crate::{Failure, Run};

/// A size, its name, how many uploads one sample has, and the target.
const SIZES: [(usize, &str, usize, Target); 2] =
    [(64 << 20, "64 MiB", 3, Target::RatioAtLeast(0.97)), (1 << 30, "1 GiB", 1, Target::RatioAtLeast(0.97))];
/// CPU seconds of the broker for each GB.
const CPU: Target = Target::ValueAtMost(0.05);
/// The memory of the broker.
const MEMORY: Target = Target::ValueAtMost(64.0);

/// Bytes per second, the CPU time for them, and the memory.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    for (size, name, uploads, target) in SIZES {
        let bytes = Payload::random(size).bytes;
        let megabytes = (size * uploads) as f64 / 1_000_000.0;
        let (mut values, mut limit_values, mut cpu, mut memory) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        // In a quick run, one round of 1 GiB takes long enough.
        let rounds = if run.plan.is_full || size < 1 << 30 { run.plan.rounds } else { 1 };
        for _ in 0..rounds {
            let began = Instant::now();
            for _ in 0..uploads {
                run.servers.bucket.put_in_parts(&new_key(), &bytes).await?;
            }
            limit_values.push(megabytes / began.elapsed().as_secs_f64());
            let token = run.servers.tokens[0].clone();
            let broker = run.main_broker().await?;
            let client = Client::new(broker.url())?.with_token(token);
            broker.forget_peak()?;
            let (began, cpu_before) = (Instant::now(), broker.cpu()?);
            for _ in 0..uploads {
                upload(&client, &bytes, None).await?;
            }
            values.push(megabytes / began.elapsed().as_secs_f64());
            cpu.push(broker.cpu()?.saturating_sub(cpu_before).as_secs_f64() / (megabytes / 1000.0));
            memory.push(broker.peak_memory_mib()?);
        }
        let row = Row::ratio(format!("upload of {name}, one client, MB/s"), "direct presigned parts, MB/s", values, limit_values);
        run.rows.push(row.target(target));
        run.rows.push(Row::value(format!("broker CPU for uploads of {name}, s/GB"), cpu).target(CPU));
        run.rows.push(Row::value(format!("broker memory during uploads of {name}, peak, MiB"), memory).target(MEMORY));
    }
    Ok(())
}

/// Uploads bytes from memory with the broker's own client, and waits until the pointer is in Kafka.
pub(crate) async fn upload(client: &Client, bytes: &Bytes, part_size: Option<u64>) -> Result<(), Failure> {
    let options = UploadOptions { wait_published: true, part_size, ..UploadOptions::to(TOPIC) };
    client.upload(options).bytes(bytes.clone()).await?;
    Ok(())
}
