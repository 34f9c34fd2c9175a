//! `audit`: compares PostgreSQL, S3 and Kafka, and prints the report as text or JSON.

use super::output::{print_data, to_json};
use super::{ConfigOrDev, Error, init_logging};
use crate::app;
use crate::audit::{self, Audit, Report};
use crate::kafka::Kafka;
use crate::objects::Objects;
use crate::store::Store;

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigOrDev,
    /// Repair what is safe, without deleting an object; the report shows the repairs
    #[arg(long)]
    fix: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn audit(arguments: Arguments) -> Result<(), Error> {
    init_logging("lfs_broker=warn,error");
    let report = run(arguments.config.load()?, arguments.fix).await.map_err(Error::AuditFailed)?;
    match arguments.json {
        true => print_data(&to_json(&report))?,
        false => print_data(report_text(&report).trim_end())?,
    }
    match report.findings.iter().map(|finding| finding.count).sum() {
        0 => Ok(()),
        count => Err(Error::Findings(count)),
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

fn report_text(report: &Report) -> String {
    let mut text = format!("checked {} uploads, {} objects, {} records\n", report.sessions, report.objects, report.records);
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
        text += "PostgreSQL, S3 and Kafka agree\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Finding, FindingKind};

    #[test]
    fn the_text_report_shows_counts_meanings_and_examples() {
        let clean = Report { clean: true, sessions: 3, objects: 2, records: 1, findings: Vec::new() };
        assert_eq!(report_text(&clean), "checked 3 uploads, 2 objects, 1 records\nPostgreSQL, S3 and Kafka agree\n");
        let kind = FindingKind::KafkaAhead;
        let examples = vec!["one".to_owned(), "two".to_owned()];
        let finding = Finding { kind, meaning: kind.meaning(), count: 3, bytes: 12, fixed: 2, examples };
        let found = Report { clean: false, findings: vec![finding], ..clean };
        assert_eq!(
            report_text(&found),
            "checked 3 uploads, 2 objects, 1 records\n\
             kafka-ahead: 3 (12 bytes, 2 repaired): \
             uploads that Kafka holds but that are not published here; --fix saves them as published\n  \
             one\n  two\n  and 1 more\n"
        );
    }
}
