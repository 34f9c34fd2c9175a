//! Which faults happen, and when: a list that depends only on the seed.

use std::fmt;
use std::time::Duration;

/// The servers that a fault kills or stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    /// One replica of the broker.
    Replica(usize),
    /// All replicas at once.
    Replicas,
    /// All of PostgreSQL's processes.
    Postgres,
    /// One of PostgreSQL's processes: then the server closes every connection and recovers.
    Backend,
    Kafka,
    Minio,
    /// Every server at once, as in a power loss, except that the page cache survives.
    Everything,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replica(number) => write!(f, "replica-{number}"),
            Self::Replicas => f.write_str("all replicas"),
            Self::Postgres => f.write_str("postgres"),
            Self::Backend => f.write_str("a postgres backend"),
            Self::Kafka => f.write_str("kafka"),
            Self::Minio => f.write_str("minio"),
            Self::Everything => f.write_str("everything"),
        }
    }
}

/// A connection that goes through a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Link {
    /// Clients to a replica.
    Http(usize),
    /// A replica to PostgreSQL.
    Postgres(usize),
    /// A replica to Kafka.
    Kafka(usize),
    /// A replica to S3.
    S3(usize),
    /// Clients to S3.
    Bytes,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(number) => write!(f, "http-{number}"),
            Self::Postgres(number) => write!(f, "postgres-{number}"),
            Self::Kafka(number) => write!(f, "kafka-{number}"),
            Self::S3(number) => write!(f, "s3-{number}"),
            Self::Bytes => f.write_str("s3-clients"),
        }
    }
}

impl Link {
    /// Every link of this many replicas.
    pub(crate) fn all(replicas: usize) -> Vec<Self> {
        let of = |number| [Self::Http(number), Self::Postgres(number), Self::Kafka(number), Self::S3(number)];
        (0..replicas).flat_map(of).chain([Self::Bytes]).collect()
    }
}

/// What a proxy does to its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Toxic {
    /// Requests are lost, and connections hang.
    LostRequests,
    /// Requests arrive, but responses are lost.
    LostResponses,
    /// Connections end in the middle of a request.
    CutRequests(u32),
    /// Connections end in the middle of a response.
    CutResponses(u32),
    /// Connections are reset.
    Reset,
    /// New connections are refused, and existing ones are closed.
    Refused,
    /// Responses are delayed.
    Slow(u32),
}

impl Toxic {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LostRequests => "lost requests",
            Self::LostResponses => "lost responses",
            Self::CutRequests(_) => "cut requests",
            Self::CutResponses(_) => "cut responses",
            Self::Reset => "resets",
            Self::Refused => "refusals",
            Self::Slow(_) => "delays",
        }
    }
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL, and a restart after the event's duration.
    Kill(Target),
    /// SIGSTOP, and SIGCONT after the event's duration.
    Stop(Target),
    Network(Link, Toxic),
}

/// A fault with its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    /// The delay after the previous event.
    pub(crate) delay: Duration,
    pub(crate) fault: Fault,
    pub(crate) duration: Duration,
}

/// The servers besides the replicas that a kill of everything includes.
const SERVERS: usize = 3;

/// How many kills a target counts as.
pub(crate) fn kills_of(target: Target, replicas: usize) -> usize {
    match target {
        Target::Replicas => replicas,
        Target::Everything => replicas + SERVERS,
        _ => 1,
    }
}

/// Draws faults until they include this many kills. Each kind of fault comes once, in random order, before the rest is random.
pub(crate) fn generate(seed: u64, kills: usize, replicas: usize) -> Vec<Event> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut faults: Vec<Fault> = Vec::new();
    let each = |build: fn(Target) -> Fault| {
        let replicas = (0..replicas).map(Target::Replica);
        replicas.chain([Target::Postgres, Target::Kafka, Target::Minio]).map(build).collect::<Vec<_>>()
    };
    faults.extend(each(Fault::Kill));
    faults.extend(each(Fault::Stop));
    faults.extend([Target::Replicas, Target::Backend].map(Fault::Kill));
    let links = Link::all(replicas);
    for toxic in 0..TOXICS {
        faults.push(Fault::Network(links[random.usize(..links.len())], toxic_of(toxic, &mut random)));
    }
    random.shuffle(&mut faults);
    let mut events = Vec::new();
    let mut kills_left = kills;
    let mut each_once = faults.into_iter();
    while kills_left > 0 {
        let fault = each_once.next().unwrap_or_else(|| random_fault(&mut random, &links, replicas));
        if let Fault::Kill(target) = fault {
            kills_left = kills_left.saturating_sub(kills_of(target, replicas));
        }
        let delay = Duration::from_millis(random.u64(100..1600));
        events.push(Event { delay, fault, duration: duration_of(fault, &mut random) });
    }
    events
}

const TOXICS: usize = 7;

fn toxic_of(number: usize, random: &mut fastrand::Rng) -> Toxic {
    match number {
        0 => Toxic::LostRequests,
        1 => Toxic::LostResponses,
        2 => Toxic::CutRequests(random.u32(0..3000)),
        3 => Toxic::CutResponses(random.u32(0..3000)),
        4 => Toxic::Reset,
        5 => Toxic::Refused,
        _ => Toxic::Slow(random.u32(50..1500)),
    }
}

fn random_fault(random: &mut fastrand::Rng, links: &[Link], replicas: usize) -> Fault {
    match random.u32(..100) {
        0..52 => Fault::Kill(match random.u32(..100) {
            0..45 => Target::Replica(random.usize(..replicas)),
            45..53 => Target::Replicas,
            53..63 => Target::Postgres,
            63..72 => Target::Backend,
            // Kafka takes seconds to restart, and a run learns little meanwhile.
            72..79 => Target::Kafka,
            79..98 => Target::Minio,
            _ => Target::Everything,
        }),
        52..66 => Fault::Stop(match random.u32(..100) {
            0..50 => Target::Replica(random.usize(..replicas)),
            50..68 => Target::Postgres,
            68..82 => Target::Kafka,
            _ => Target::Minio,
        }),
        _ => {
            let toxic = random.usize(..TOXICS);
            Fault::Network(links[random.usize(..links.len())], toxic_of(toxic, random))
        }
    }
}

/// How long a fault lasts. A replica may be stopped for longer than its leases, so that it continues as a zombie.
fn duration_of(fault: Fault, random: &mut fastrand::Rng) -> Duration {
    let within = |random: &mut fastrand::Rng, from, to| Duration::from_millis(random.u64(from..to));
    match fault {
        Fault::Kill(Target::Replica(_)) => within(random, 0, 3000),
        Fault::Kill(_) => within(random, 0, 1500),
        Fault::Stop(Target::Replica(_)) => within(random, 500, 9000),
        // Longer than Kafka's session timeout, so that the node finds itself fenced when it continues.
        Fault::Stop(Target::Kafka) => within(random, 2500, 6000),
        Fault::Stop(_) => within(random, 300, 6000),
        Fault::Network(_, Toxic::Refused) => within(random, 200, 3000),
        Fault::Network(..) => within(random, 300, 5000),
    }
}
