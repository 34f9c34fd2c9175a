//! `audit`: whether PostgreSQL, S3 and Kafka tell the same story, for people and for machines.

use super::{Config, Error, log, talk};
use crate::app;
use crate::audit::{self, Audit, Report};
use crate::kafka::Kafka;
use crate::objects::Objects;
use crate::store::Store;

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: Config,
    /// Repair what is safe: deletes no object, and says what it did
    #[arg(long)]
    fix: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn audit(arguments: Arguments) -> Result<(), Error> {
    log("lfs_broker=warn,error");
    let report = run(arguments.config.load()?, arguments.fix).await.map_err(Error::Unchecked)?;
    match arguments.json {
        true => talk::data(&talk::json(&report))?,
        false => talk::data(words(&report).trim_end())?,
    }
    match report.findings.iter().map(|finding| finding.count).sum() {
        0 => Ok(()),
        found => Err(Error::Findings(found)),
    }
}

async fn run(settings: app::Settings, fix: bool) -> Result<Report, audit::Error> {
    let store = Store::connect(&settings.store)?;
    let objects = Objects::connect(&settings.objects).await?;
    let kafka = Kafka::connect(&settings.kafka)?;
    let report = Audit { store: store.clone(), objects, kafka, fix }.run().await;
    store.close().await;
    report
}

fn words(report: &Report) -> String {
    let mut text = format!("looked at {} sessions, {} objects, {} records\n", report.sessions, report.objects, report.records);
    for finding in &report.findings {
        let fixed = if finding.fixed > 0 { format!(", {} repaired", finding.fixed) } else { String::new() };
        text += &format!("{}: {} ({} bytes{fixed}): {}\n", finding.kind, finding.count, finding.bytes, finding.meaning);
        for example in &finding.examples {
            text += &format!("  {example}\n");
        }
        let more = finding.count.saturating_sub(finding.examples.len() as u64);
        if more > 0 {
            text += &format!("  and {more} more\n");
        }
    }
    if report.clean {
        text += "they tell the same story\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Finding, Kind};

    #[test]
    fn a_report_reads_alone() {
        let clean = Report { clean: true, sessions: 3, objects: 2, records: 1, findings: Vec::new() };
        assert_eq!(words(&clean), "looked at 3 sessions, 2 objects, 1 records\nthey tell the same story\n");
        let kind = Kind::KafkaAhead;
        let examples = vec!["one".to_owned(), "two".to_owned()];
        let finding = Finding { kind, meaning: kind.meaning(), count: 3, bytes: 12, fixed: 2, examples };
        let found = Report { clean: false, findings: vec![finding], ..clean };
        assert_eq!(
            words(&found),
            "looked at 3 sessions, 2 objects, 1 records\n\
             kafka-ahead: 3 (12 bytes, 2 repaired): uploads that Kafka holds and that are not published here; --fix writes it down\n  \
             one\n  two\n  and 1 more\n"
        );
    }
}
