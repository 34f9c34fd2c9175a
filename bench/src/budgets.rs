//! The counts that CI guards. None depends on the speed of the machine. Each has a limit, above which CI fails, and a goal.
//! `docs/performance.md` shows the same table, and a test keeps it in step.

use crate::report::{Row, Target};

/// A count that the line `counts` measures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// The row of the report.
    pub(crate) measure: &'static str,
    /// CI fails above it. It leaves a margin for what workers do meanwhile.
    pub(crate) limit: f64,
    /// What the design aims at, and what the report compares with.
    pub(crate) goal: f64,
}

/// The session, its history and its quota.
pub(crate) const OPEN: Budget = Budget { measure: "statements on PostgreSQL for one open", limit: 1.4, goal: 2.0 };
/// The key as well.
pub(crate) const OPEN_WITH_KEY: Budget =
    Budget { measure: "statements on PostgreSQL for one open with Idempotency-Key", limit: 1.4, goal: 2.0 };
/// Each transaction that writes waits for the disk.
pub(crate) const OPEN_WRITES: Budget = Budget { measure: "transactions that write for one open", limit: 1.2, goal: 1.0 };
/// A plan that reads a whole table to open or complete one upload gets slower with every upload that is stored.
pub(crate) const FULL_SCANS: Budget =
    Budget { measure: "rows that full scans of growing tables read, for one upload with Idempotency-Key", limit: 5.0, goal: 2.0 };
/// What the request itself does: everything without the share of the relay.
pub(crate) const COMPLETE: Budget =
    Budget { measure: "statements on PostgreSQL for one complete of a single PUT, without the relay", limit: 6.0, goal: 4.0 };
/// What the relay does for one transaction of Kafka, however many records are in it.
pub(crate) const RELAY: Budget = Budget { measure: "statements on PostgreSQL for one batch of the relay", limit: 4.5, goal: 3.0 };
/// The writes of the request and of its own batch.
pub(crate) const COMPLETE_WRITES: Budget =
    Budget { measure: "transactions that write for one complete, with its batch", limit: 4.0, goal: 3.0 };
/// With no request at all. PostgreSQL's own workers count as well: 72 to 124 were measured, 44 to 64 of them the broker's.
pub(crate) const IDLE: Budget = Budget { measure: "idle: transactions on PostgreSQL in a minute", limit: 150.0, goal: 60.0 };
/// One client, so one transaction for each upload.
pub(crate) const KAFKA: Budget = Budget { measure: "requests to Kafka for one upload, 1 client", limit: 4.8, goal: 4.0 };

/// All budgets, in the order of the report.
pub(crate) const BUDGETS: [Budget; 9] =
    [IDLE, OPEN, OPEN_WRITES, OPEN_WITH_KEY, FULL_SCANS, COMPLETE, RELAY, COMPLETE_WRITES, KAFKA];

impl Budget {
    /// The row of the report.
    pub(crate) fn row(self, value: f64) -> Row {
        // PostgreSQL's own workers and the ticks of the idle broker change the hundredths.
        let rounded = (value * 10.0).round() / 10.0;
        Row::value(self.measure, vec![rounded]).target(Target::ValueAtMost(self.goal))
    }
}

/// The budgets that the rows exceed, in words. A budget without a row counts as exceeded.
pub(crate) fn exceeded(rows: &[Row]) -> Vec<String> {
    let check = |budget: &Budget| {
        let Budget { measure, limit, .. } = budget;
        match rows.iter().find(|row| row.measure == *measure).and_then(Row::median) {
            Some(value) if value <= *limit => None,
            Some(value) => Some(format!("{measure}: {value:.2}, and the limit is {limit}")),
            None => Some(format!("{measure}: not measured")),
        }
    };
    BUDGETS.iter().filter_map(check).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser as _;

    use super::*;
    use crate::report::replace_section;
    use crate::{Arguments, runtime};

    fn table() -> String {
        let rows = BUDGETS.iter().map(|Budget { measure, limit, goal }| format!("| {measure} | {limit} | {goal} |\n"));
        format!("| count | limit in CI | goal |\n|---|---|---|\n{}", rows.collect::<String>())
    }

    #[test]
    fn the_documented_budgets_are_those_of_ci() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
        let documented = std::fs::read_to_string(&path).unwrap();
        let current = replace_section(&documented, "budgets", &table()).unwrap();
        if current != documented {
            std::fs::write(&path, current).unwrap();
            panic!("docs/performance.md was out of date, and this test has rewritten it: review the change and commit it");
        }
    }

    #[test]
    fn a_missing_count_and_one_above_its_limit_exceed_their_budgets() {
        let mut rows: Vec<Row> = BUDGETS.iter().map(|budget| budget.row(budget.limit)).collect();
        assert_eq!(exceeded(&rows), Vec::<String>::new());
        rows.remove(0);
        rows[0] = BUDGETS[1].row(BUDGETS[1].limit + 0.5);
        let exceeded = exceeded(&rows);
        assert_eq!(exceeded.len(), 2, "{exceeded:?}");
        assert!(exceeded[0].ends_with("not measured") && exceeded[1].starts_with(BUDGETS[1].measure), "{exceeded:?}");
    }

    #[test]
    #[ignore = "needs the broker and the servers that `.ci/bench --guard` starts"]
    fn no_count_exceeds_its_limit() {
        let arguments = Arguments::parse_from(["lfs-broker-bench", "counts"]);
        let report = runtime().unwrap().block_on(crate::run(&arguments)).unwrap();
        println!("{}\n{}", report.table(), report.notes());
        assert_eq!(report.exceeded, Vec::<String>::new(), "the limits are in bench/src/budgets.rs");
    }
}
