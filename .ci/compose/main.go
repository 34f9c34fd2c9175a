// Loads a compose file as `docker compose` does, and prints its error if the file is invalid: load FILE [SERVICE]
// The library's own command does not check references between services, so this program loads the whole project.
// With SERVICE, it prints the environment of that service's container, one NAME=VALUE per line.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

func main() {
	options, err := cli.NewProjectOptions(os.Args[1:2], cli.WithOsEnv, cli.WithName("check"))
	if err == nil {
		var project *types.Project
		if project, err = options.LoadProject(context.Background()); err == nil && len(os.Args) > 2 {
			err = printEnvironment(project, os.Args[2])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func printEnvironment(project *types.Project, name string) error {
	service, err := project.GetService(name)
	if err != nil {
		return err
	}
	for variable, value := range service.Environment {
		if value != nil {
			fmt.Printf("%s=%s\n", variable, *value)
		}
	}
	return nil
}
