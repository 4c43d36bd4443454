//! What is counted and measured: one registry for the whole program, and the texts it is told in. Pure.
//!
//! Every figure has a name of ours, in base units, and where PGHoard has a name for it, that one too, so
//! that a dashboard made for either works. Counters count; they never go back while the program runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

/// How a figure behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// One figure, of which there is a series for every set of labels.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// PGHoard's names have dots, which become `_` where a dot cannot be.
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
}

impl Metric {
    /// Whether it is one of PGHoard's names.
    pub fn is_pghoard(&self) -> bool {
        self.name.starts_with("pghoard.")
    }
}

/// Labels that a user adds to everything, by name.
pub type Tags = BTreeMap<String, String>;

/// One series at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    pub metric: Metric,
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
    /// How often it was written: a gauge that is set to the same again is news to some readers.
    pub updates: u64,
}

impl Sample {
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(label, _)| *label == name).map(|(_, value)| value.as_str())
    }
}

/// The figures of this process. Clones are the same registry.
///
/// Its size is bounded by what labels can be: sites, kinds of objects, results, names of operations.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Mutex<Registry>>);

type Labels = Vec<(&'static str, String)>;

#[derive(Debug, Default)]
struct Registry {
    families: BTreeMap<&'static str, (Metric, BTreeMap<Labels, Series>)>,
    updates: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Series {
    value: f64,
    updates: u64,
}

impl Metrics {
    /// Lets a counter grow.
    pub fn add(&self, metric: &Metric, labels: &[(&'static str, &str)], by: f64) {
        self.change(metric, labels, |value| *value += by);
    }

    /// Sets a gauge.
    pub fn set(&self, metric: &Metric, labels: &[(&'static str, &str)], value: f64) {
        self.change(metric, labels, |there| *there = value);
    }

    fn change(&self, metric: &Metric, labels: &[(&'static str, &str)], change: impl FnOnce(&mut f64)) {
        let mut labels: Labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        labels.sort_unstable();
        let mut registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        registry.updates += 1;
        let (_, family) = registry.families.entry(metric.name).or_insert_with(|| (*metric, BTreeMap::new()));
        let series = family.entry(labels).or_default();
        change(&mut series.value);
        series.updates += 1;
    }

    /// Every series, sorted by name and labels.
    pub fn samples(&self) -> Vec<Sample> {
        let registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let families = registry.families.values();
        families
            .flat_map(|(metric, family)| {
                family.iter().map(|(labels, series)| Sample {
                    metric: *metric,
                    labels: labels.clone(),
                    value: series.value,
                    updates: series.updates,
                })
            })
            .collect()
    }

    /// Grows with every change.
    pub fn updates(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).updates
    }
}

/// The samples as Prometheus scrapes them (text format 0.0.4). `samples` are sorted by name.
pub fn exposition<'a>(samples: impl IntoIterator<Item = &'a Sample>, tags: &Tags) -> String {
    let mut text = String::new();
    let mut family = "";
    for sample in samples {
        let name = plain_name(sample.metric.name);
        if family != sample.metric.name {
            family = sample.metric.name;
            let kind = match sample.metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
            };
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", sample.metric.help);
        }
        text.push_str(&name);
        let labels = merged(tags, sample);
        for (index, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let open = if index == 0 { '{' } else { ',' };
            let _ = write!(text, "{open}{}=\"{value}\"", label_name(label));
        }
        if !labels.is_empty() {
            text.push('}');
        }
        let _ = writeln!(text, " {}", sample.value);
    }
    text
}

/// A label of the sample goes before a tag of the same name.
fn merged<'a>(tags: &'a Tags, sample: &'a Sample) -> BTreeMap<&'a str, &'a str> {
    let tags = tags.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    tags.chain(sample.labels.iter().map(|(name, value)| (*name, value.as_str()))).collect()
}

/// PGHoard's rule: `.` and `-` become `_`.
fn plain_name(name: &str) -> String {
    name.replace(['.', '-'], "_")
}

/// A name that Prometheus takes.
fn label_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = name.chars().map(plain).collect();
    if name.starts_with(|c: char| c.is_ascii_digit()) { format!("_{name}") } else { name }
}

/// How a statsd server wants its tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StatsdFormat {
    /// `name,tag=value:1|c`
    #[default]
    Telegraf,
    /// `name:1|c|#tag:value`
    Datadog,
}

/// One statsd line; `kind` is statsd's letter.
pub fn statsd_line<'a>(
    format: StatsdFormat,
    name: &str,
    tags: impl IntoIterator<Item = (&'a str, &'a str)>,
    value: f64,
    kind: char,
) -> String {
    // What would end a tag or the line ends neither.
    let clean = |text: &str| text.replace(|c: char| matches!(c, ',' | '|' | '#') || c.is_whitespace(), "_");
    let clean_both = |text: &str| clean(text).replace([':', '='], "_");
    let mut line = name.to_owned();
    match format {
        StatsdFormat::Telegraf => {
            for (tag, value) in tags {
                let _ = write!(line, ",{}={}", clean_both(tag), clean_both(value));
            }
            let _ = write!(line, ":{value}|{kind}");
        }
        StatsdFormat::Datadog => {
            let _ = write!(line, ":{value}|{kind}");
            for (index, (tag, value)) in tags.into_iter().enumerate() {
                let separator = if index == 0 { "|#" } else { "," };
                let _ = write!(line, "{separator}{}:{}", clean_both(tag), clean(value));
            }
        }
    }
    line
}

/// Turns samples into statsd lines: what has changed since the last time, counters as what they grew by.
#[derive(Debug, Default)]
pub struct StatsdLines {
    told: BTreeMap<(&'static str, Labels), Series>,
}

impl StatsdLines {
    pub fn next(&mut self, samples: Vec<Sample>, format: StatsdFormat, tags: &Tags) -> Vec<String> {
        let mut lines = Vec::new();
        for sample in samples {
            let now = Series { value: sample.value, updates: sample.updates };
            let line =
                |value, kind| statsd_line(format, sample.metric.name, merged(tags, &sample), value, kind);
            let key = (sample.metric.name, sample.labels.clone());
            let before = self.told.get(&key).copied().unwrap_or_default();
            match sample.metric.kind {
                Kind::Counter if now.value > before.value => lines.push(line(now.value - before.value, 'c')),
                Kind::Gauge if now.updates != before.updates => lines.push(line(now.value, 'g')),
                _ => continue,
            }
            self.told.insert(key, now);
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COUNTER: Metric = Metric { name: "pghoard.upload_size", kind: Kind::Counter, help: "Bytes." };
    const GAUGE: Metric = Metric { name: "pgkeep_wal_lag_bytes", kind: Kind::Gauge, help: "Lag." };

    fn tags(pairs: &[(&str, &str)]) -> Tags {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn prometheus_reads_names_labels_and_sums() {
        let metrics = Metrics::default();
        metrics.add(&COUNTER, &[("type", "xlog"), ("site", "a\"b\\")], 5.0);
        metrics.add(&COUNTER, &[("site", "a\"b\\"), ("type", "xlog")], 2.5);
        metrics.set(&GAUGE, &[], 7.0);
        metrics.set(&GAUGE, &[], 3.0);
        assert_eq!(
            exposition(&metrics.samples(), &tags(&[("app", "x"), ("1st-tag", "y"), ("type", "lost")])),
            "# HELP pghoard_upload_size Bytes.\n\
             # TYPE pghoard_upload_size counter\n\
             pghoard_upload_size{_1st_tag=\"y\",app=\"x\",site=\"a\\\"b\\\\\",type=\"xlog\"} 7.5\n\
             # HELP pgkeep_wal_lag_bytes Lag.\n\
             # TYPE pgkeep_wal_lag_bytes gauge\n\
             pgkeep_wal_lag_bytes{_1st_tag=\"y\",app=\"x\",type=\"lost\"} 3\n"
        );
    }

    #[test]
    fn statsd_is_told_what_changed_once_and_counters_by_their_growth() {
        let metrics = Metrics::default();
        let mut lines = StatsdLines::default();
        let tags = tags(&[("app", "x")]);
        let mut next = |metrics: &Metrics| lines.next(metrics.samples(), StatsdFormat::Telegraf, &tags);
        metrics.add(&COUNTER, &[("type", "xlog"), ("site", "main")], 5.0);
        metrics.set(&GAUGE, &[("site", "main")], 9.0);
        assert_eq!(
            next(&metrics),
            ["pghoard.upload_size,app=x,site=main,type=xlog:5|c", "pgkeep_wal_lag_bytes,app=x,site=main:9|g"]
        );
        assert_eq!(next(&metrics), [""; 0]);
        metrics.add(&COUNTER, &[("type", "xlog"), ("site", "main")], 2.0);
        metrics.set(&GAUGE, &[("site", "main")], 9.0);
        assert_eq!(
            next(&metrics),
            ["pghoard.upload_size,app=x,site=main,type=xlog:2|c", "pgkeep_wal_lag_bytes,app=x,site=main:9|g"]
        );
    }

    #[test]
    fn datadog_has_its_tags_at_the_end() {
        let line = statsd_line(
            StatsdFormat::Datadog,
            "pghoard.backup_time",
            [("a", "1"), ("b", "x:y,z|")],
            1.5,
            'g',
        );
        assert_eq!(line, "pghoard.backup_time:1.5|g|#a:1,b:x:y_z_");
        assert_eq!(statsd_line(StatsdFormat::Datadog, "n", [], 2.0, 'c'), "n:2|c");
    }

    proptest! {
        #[test]
        fn no_tag_breaks_a_line(name in "\\PC{0,10}", value in "(?s).{0,20}") {
            for format in [StatsdFormat::Telegraf, StatsdFormat::Datadog] {
                let line = statsd_line(format, "n", [(name.as_str(), value.as_str())], 1.0, 'c');
                prop_assert!(!line.contains('\n'));
                prop_assert_eq!(line.matches("|c").count(), 1);
                prop_assert_eq!(line.matches(',').count(), usize::from(format == StatsdFormat::Telegraf));
            }
        }

        #[test]
        fn an_exposition_has_one_line_for_a_sample(value in "(?s).{0,20}") {
            let metrics = Metrics::default();
            metrics.set(&GAUGE, &[("site", &value)], 1.0);
            prop_assert_eq!(exposition(&metrics.samples(), &Tags::new()).split('\n').count(), 4);
        }
    }
}
