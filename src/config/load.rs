//! From a file or the environment to a [`Config`].

use std::collections::BTreeSet;
use std::path::{self, Path, PathBuf};

use serde_json::Value;

use super::environment::{self, Document};
use super::error::{Error, Problem, Warning, reworded};
use super::indirect;
use super::keys;
use super::model::{Config, Host};
use super::raw::RawConfig;
use crate::runtime::Lookup;

/// Variables that name the file, the first that is set counts.
const FILE_VARIABLES: [&str; 2] = ["PGKEEP_CONFIG", "PGHOARD_CONFIG"];

/// Where a configuration comes from. It can be loaded any number of times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    Environment,
}

/// A configuration, and what to tell about it.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    pub warnings: Vec<Warning>,
}

impl Source {
    /// The file given, else the one an environment variable names, else the environment itself.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is none of these.
    pub fn find(file: Option<&Path>, env: Lookup) -> Result<Self, Error> {
        let named = || FILE_VARIABLES.iter().find_map(|name| env(name)).map(PathBuf::from);
        match file.map(Path::to_owned).or_else(named) {
            Some(path) => Ok(Self::File(path)),
            None if env(environment::STORAGE).is_some() => Ok(Self::Environment),
            None => Err(Error::Missing),
        }
    }
}

impl Config {
    /// Reads, checks and completes the configuration.
    ///
    /// # Errors
    /// When it cannot be read, or has anything that keeps it from being used; all such places are named.
    pub fn load(source: &Source, env: Lookup) -> Result<Loaded, Error> {
        match source {
            Source::File(path) => load_file(path, env),
            Source::Environment => load_environment(env),
        }
    }
}

fn load_file(path: &Path, env: Lookup) -> Result<Loaded, Error> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let full = path::absolute(path).map_err(unreadable)?;
    let origin = path.display().to_string();
    let invalid = |problems| Error::invalid(Some(&origin), problems);

    let mut document = parse(&text, &origin)?;
    let base = full.parent().unwrap_or(Path::new("/"));
    let filled = indirect::resolve(&mut document, base, env).map_err(invalid)?;
    let mut loaded = from_document(&document, &filled, env).map_err(invalid)?;
    loaded.config.source = Some(full);
    if env(environment::STORAGE).is_some() {
        loaded.warnings.push(Warning::Doubtful {
            place: environment::STORAGE.to_owned(),
            why: format!("not used, since the file `{origin}` is the configuration"),
        });
    }
    Ok(loaded)
}

fn load_environment(env: Lookup) -> Result<Loaded, Error> {
    let document = environment::document(env).ok_or(Error::Missing)?;
    let document = document.map_err(|problem| Error::invalid(None, [problem]))?;
    from_document(&document.value, &BTreeSet::new(), env)
        .map_err(|problems| Error::invalid(None, naming_variables(problems, &document)))
}

fn naming_variables(problems: Vec<Problem>, document: &Document) -> Vec<Problem> {
    let renamed = |problem: Problem| Problem::new(document.variable_for(&problem.place), problem.why);
    problems.into_iter().map(renamed).collect()
}

fn parse(text: &str, origin: &str) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let why = error.to_string();
        let why = why.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&why).to_owned();
        Error::Syntax { origin: origin.to_owned(), line, column, why }
    })
}

fn from_document(document: &Value, filled: &BTreeSet<String>, env: Lookup) -> Result<Loaded, Vec<Problem>> {
    let (mut warnings, refused) = keys::examine(document);
    if !refused.is_empty() {
        return Err(refused);
    }
    let raw = typed(document, filled).map_err(|problem| vec![problem])?;
    let current_directory = std::env::current_dir()
        .map_err(|error| vec![Problem::new("", format!("no current directory: {error}"))])?;
    let host = Host {
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        current_directory: &current_directory,
        env,
    };
    let (config, more) = Config::from_raw(&raw, host)?;
    warnings.extend(more);
    Ok(Loaded { config, warnings })
}

fn typed(document: &Value, filled: &BTreeSet<String>) -> Result<RawConfig, Problem> {
    serde_path_to_error::deserialize(document).map_err(|error| {
        let place = match error.path().to_string() {
            // serde_path_to_error's word for the document itself
            root if root == "." => String::new(),
            place => place,
        };
        let hide = filled.contains(&place) || may_be_secret(&place);
        Problem::new(place, reworded(&error.inner().to_string(), hide))
    })
}

/// Whether what stands there must not be repeated in a message: by the key's name, or because it is a
/// connection string.
fn may_be_secret(place: &str) -> bool {
    let key = place.rsplit('.').next().unwrap_or(place);
    ["password", "secret", "token", "connection_string", "access_key"].iter().any(|word| key.contains(word))
        || key.starts_with("nodes[")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Loaded, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pghoard.json");
        std::fs::write(&path, text).unwrap();
        let env = |name: &str| (name == "SECRET").then(|| "hunter2".to_owned());
        Config::load(&Source::File(path.clone()), &env)
            .map_err(|error| error.to_string().replace(&path.display().to_string(), "pghoard.json"))
    }

    /// A file of one site, with `more` members.
    fn site(more: &str) -> String {
        format!(
            r#"{{"backup_sites": {{"main": {{
                "object_storage": {{"storage_type": "local", "directory": "/x"}}, {more}
            }}}}}}"#
        )
    }

    fn problem(text: &str) -> String {
        load(text).expect_err(text)
    }

    #[test]
    fn problems_name_their_place() {
        for (text, expected) in [
            (
                site(r#""nodes": [{"port": "x"}]"#),
                r#"pghoard.json: backup_sites.main.nodes[0].port: expected a port number, found "x""#,
            ),
            (
                site(r#""active": "yes""#),
                r#"pghoard.json: backup_sites.main.active: expected true or false, found "yes""#,
            ),
            (
                site(r#""wal_flush_interval": "soon""#),
                "pghoard.json: backup_sites.main.wal_flush_interval: expected a duration such as `500ms`, `1s` \
                 or `2min`, or a number of seconds, found \"soon\"",
            ),
            (
                r#"{"compression": {"algorithm": "lz4"}}"#.to_owned(),
                r#"pghoard.json: compression.algorithm: expected `snappy`, `lzma`, `zstd`, found "lz4""#,
            ),
            (
                r#"{"backup_sites": {"main": {}}}"#.to_owned(),
                "pghoard.json: backup_sites.main.object_storage: missing; it says where the site is stored",
            ),
            (
                "{\n  \"a\": 1\n  \"b\": 2\n}".to_owned(),
                "pghoard.json: line 3, column 3: expected `,` or `}`",
            ),
            ("[]".to_owned(), "pghoard.json: expected an object, found an array"),
            (
                r#"{"compression": ["zstd"]}"#.to_owned(),
                "pghoard.json: compression: expected an object, found an array",
            ),
            (r#""x""#.to_owned(), r#"pghoard.json: expected an object, found "x""#),
        ] {
            assert_eq!(problem(&text), expected);
        }
    }

    #[test]
    fn secrets_are_not_repeated_in_messages() {
        for text in [
            r#"{"http_port": {"env": "SECRET"}}"#.to_owned(),
            r#"{"webserver_password": ["hunter2"]}"#.to_owned(),
            site(r#""nodes": [{"port": {"env": "SECRET"}}]"#),
            site(r#""nodes": [{"connection_string": "password=hunter2", "host": "x"}]"#),
        ] {
            let message = problem(&text);
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn all_problems_of_the_model_come_at_once() {
        let message =
            problem(&site(r#""basebackup_hour": 24, "slot": "Main-Slot", "basebackup_interval_hours": 0"#));
        assert_eq!(message.lines().count(), 3, "{message}");
        assert!(message.contains("`Main-Slot` is not a replication slot name"), "{message}");
    }

    #[test]
    fn null_is_the_default_except_where_it_means_off() {
        let loaded = load(&site(
            r#""prefix": null, "basebackup_interval_hours": null, "basebackup_count": null, "nodes": null"#,
        ));
        let config = loaded.unwrap().config;
        let site = &config.sites[0];
        assert_eq!(site.prefix, "main");
        assert_eq!(site.schedule.interval, None);
        assert_eq!(site.retention.count, None);
        let config = load(&site_without_more()).unwrap().config;
        assert_eq!(config.sites[0].schedule.interval, Some(jiff::SignedDuration::from_hours(24)));
        assert_eq!(config.sites[0].retention.count, Some(2));
        assert_eq!(config.sites[0].retention.count_min, 2);
        assert_eq!(config.sites[0].slot, "pgkeep_main");
        assert_eq!((config.http.address.as_str(), config.http.port), ("127.0.0.1", 16000));
        assert_eq!(config.memory_limit, 64 << 20);
    }

    fn site_without_more() -> String {
        site(r#""active": true"#)
    }

    #[test]
    fn nodes_take_every_form_of_pghoard() {
        let config = load(&site(
            r#""nodes": [
                {"host": "db", "port": 5433, "user": "it's", "slot": "s1", "sslmode": null},
                {"connection_string": "host=b", "slot": "s2"},
                "host=c",
                "postgres://u@d/x"
            ]"#,
        ))
        .unwrap()
        .config;
        let nodes: Vec<_> =
            config.sites[0].nodes.iter().map(|n| (n.conninfo.reveal().as_str(), n.slot.as_deref())).collect();
        assert_eq!(
            nodes,
            [
                (r"host='db' port='5433' user='it\'s'", Some("s1")),
                ("host=b", Some("s2")),
                ("host=c", None),
                ("postgres://u@d/x", None),
            ]
        );
    }

    #[test]
    fn two_sites_in_one_place_are_refused() {
        let storage = r#""object_storage": {"storage_type": "local", "directory": "/x"}, "prefix": "p""#;
        let text = format!(r#"{{"backup_sites": {{"a": {{{storage}}}, "b": {{{storage}}}}}}}"#);
        assert!(problem(&text).contains("site `a` has the same object storage and prefix"));
    }

    #[test]
    fn one_site_needs_no_name_and_several_do() {
        let config = load(&site_without_more()).unwrap().config;
        assert_eq!(config.site(None).unwrap().name, "main");
        assert!(matches!(config.site(Some("other")), Err(Error::NoSuchSite { .. })));
    }

    #[test]
    fn the_file_given_goes_before_variables_and_those_before_the_environment() {
        let env = |name: &str| match name {
            "PGHOARD_CONFIG" => Some("/hoard.json".to_owned()),
            "PGKEEP_STORAGE" => Some("file:///x".to_owned()),
            _ => None,
        };
        let find = |file: Option<&str>, env: Lookup| Source::find(file.map(Path::new), env);
        assert_eq!(find(Some("/a.json"), &env).unwrap(), Source::File("/a.json".into()));
        assert_eq!(find(None, &env).unwrap(), Source::File("/hoard.json".into()));
        assert_eq!(
            find(None, &|name| env(name).filter(|_| name == "PGKEEP_STORAGE")).unwrap(),
            Source::Environment
        );
        assert!(matches!(find(None, &|_| None), Err(Error::Missing)));
    }

    #[test]
    fn a_wrong_variable_is_named() {
        let env = |name: &str| match name {
            "PGKEEP_STORAGE" => Some("file:///x".to_owned()),
            "PGKEEP_HTTP_PORT" => Some("x".to_owned()),
            _ => None,
        };
        let error = Config::load(&Source::Environment, &env).unwrap_err();
        assert_eq!(error.to_string(), r#"PGKEEP_HTTP_PORT: expected a port number, found "x""#);
    }
}
