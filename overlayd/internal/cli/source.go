package cli

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
)

// configFile is the annotation of the flag that names the file in which the
// other flags of its command can be set.
const configFile = "overlayd.config-file"

// ConfigFile declares --config, which names a YAML file with the names of the
// command's other flags as keys.
func ConfigFile(fs *pflag.FlagSet, to *string) {
	fs.Var(String(to, "", "FILE"), "config", "YAML file with the names of these flags as keys")
	fs.SetAnnotation("config", configFile, nil) // cannot fail, the flag is there
}

// EnvName is the environment variable that stands for a flag.
func EnvName(flag string) string {
	return "OVERLAYD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// fillFlags sets the flags that the command line does not: from the
// environment, else from the configuration file.
func fillFlags(fs *pflag.FlagSet, env LookupEnv) error {
	file, err := fromConfigFile(fs, env)
	if err != nil {
		return err
	}
	fs.VisitAll(func(f *pflag.Flag) {
		if err != nil || f.Changed || f.Name == "help" {
			return
		}
		value, ok := env(EnvName(f.Name))
		source := EnvName(f.Name)
		if !ok {
			value, ok = file[f.Name]
			source = f.Name + " in the configuration file"
		}
		if !ok {
			return
		}
		if e := f.Value.Set(value); e != nil {
			err = Usagef("%s: %w", source, explain(f, value, e))
		}
	})
	return err
}

// fromConfigFile reads the file that a flag of the set names, if there is such a
// flag and it or the environment names one.
func fromConfigFile(fs *pflag.FlagSet, env LookupEnv) (map[string]string, error) {
	var self *pflag.Flag
	var names []string
	fs.VisitAll(func(f *pflag.Flag) {
		if _, ok := f.Annotations[configFile]; ok {
			self = f
		} else if f.Name != "help" {
			names = append(names, f.Name)
		}
	})
	if self == nil {
		return nil, nil
	}
	path := self.Value.String()
	if v, ok := env(EnvName(self.Name)); ok && !self.Changed {
		path = v
	}
	if path == "" {
		return nil, nil
	}
	values, problems, err := clusterfile.LoadFlags(path, names)
	if err != nil {
		return nil, UsageError{err}
	}
	out := map[string]string{}
	for _, name := range names {
		items, ok := values[name]
		if !ok {
			continue
		}
		separator := ""
		if l, ok := fs.Lookup(name).Value.(interface{ Separator() string }); ok {
			separator = l.Separator()
		}
		if len(items) != 1 && separator == "" {
			problems = append(problems, conf.Problem{Path: name, Text: "want one value, not a list"})
		}
		out[name] = strings.Join(items, separator)
	}
	return out, Problems(path, problems)
}

// Problems makes one UsageError of all problems of a file, or nil.
func Problems(path string, problems []conf.Problem) error {
	if len(problems) == 0 {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d problem", path, len(problems))
	if len(problems) > 1 {
		b.WriteByte('s')
	}
	for _, p := range problems {
		b.WriteString("\n  " + p.String())
	}
	return UsageError{errors.New(b.String())}
}
